"""Older layouts of manifest.json, brought up to date one version at a time.

Schema 1 had one range per quantizer, named ``<module>.<slot>_quantizer.amax``, and format and
granularity beside each other. Schema 2 has a whole spec per entry, and every tensor of a quantizer
under ``bittern.quantizers/<module>.<slot>/<name>``. Schema 3 has a stack of modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bittern.errors import CheckpointError

__all__ = ["SCHEMA", "migrated"]

SCHEMA = 3


def migrated(data: Any, *, where: str) -> dict[str, Any]:
    """Return the data of a manifest in the layout of today.

    Args:
        data: What the file holds.
        where: The file, for errors.

    Raises:
        CheckpointError: It is malformed, or newer than this version.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        raise CheckpointError(
            "malformed: no schema",
            where=where,
            hint="if it is no manifest of bittern's but another tool's, move it elsewhere",
        )
    if schema > SCHEMA:
        raise CheckpointError(
            f"written by bittern {data.get('bittern')}, which is newer than this one",
            where=where,
            hint="pip install -U bittern",
        )
    try:
        for version in range(schema, SCHEMA):
            data = _STEPS[version](data)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"malformed: {error!r}", where=where) from error
    found: dict[str, Any] = data
    return found


def _to_2(data: dict[str, Any]) -> dict[str, Any]:
    entries = []
    for old in data["entries"]:
        entry = dict(old)
        spec = {"format": entry.pop("format"), "granularity": entry.pop("granularity")}
        if entry.pop("dynamic"):
            spec["dynamic"] = True
        entries.append({**entry, "spec": spec})
    return {**data, "entries": entries, "schema": 2}


def _to_3(data: dict[str, Any]) -> dict[str, Any]:
    rest = dict(data)
    plan = {name: rest.pop(name) for name in ("recipe", "entries", "algorithm")}
    mode = {
        "name": "quantize",
        "plugin": "bittern",
        "config": {"recipe": plan["recipe"]},
        "metadata": plan,
    }
    return {**rest, "modes": [mode], "schema": 3}


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _to_2, 2: _to_3}
