"""Reads what manifest.json of a saved state says was done to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["modules_of_state", "state_of"]


def state_of(path: Path) -> dict[str, Any] | None:
    """Return the gist of a state's manifest, ``None`` where there is none.

    Raises:
        CheckpointError: It is malformed, or newer than this version.
    """
    if not (path / "manifest.json").exists():
        return None
    from bittern.checkpoint.manifest import Manifest

    manifest = Manifest.read(path)
    return {
        "version": manifest.bittern,
        "schema": manifest.schema,
        "plugins": manifest.plugins,
        "tensors": manifest.io,
        "weights": manifest.weights,
        "modes": [
            {
                "name": mode.name,
                "plugin": mode.plugin,
                "config": mode.config,
                "metadata": {
                    key: value
                    for key, value in mode.metadata.items()
                    if key not in ("entries", "skipped")
                },
                "quantizers": len(_list(mode.metadata.get("entries"))),
            }
            for mode in manifest.modes
        ],
    }


def modules_of_state(path: Path) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Return ``(module, ("weight: int8/channel", ..))`` of every quantized module of a state."""
    from bittern.checkpoint.manifest import Manifest

    slots: dict[str, list[str]] = {}
    for mode in Manifest.read(path).modes:
        for entry in _list(mode.metadata.get("entries")):
            if isinstance(entry, Mapping):
                text = f"{entry.get('slot')}: {_spec(entry.get('spec'))}"
                slots.setdefault(str(entry.get("module")), []).append(text)
    return [(module or "(model)", tuple(found)) for module, found in slots.items()]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _spec(spec: Any) -> str:
    """Return a spec in the words of a report, as ``int4/group[128]``."""
    if not isinstance(spec, Mapping):
        return "?"
    granularity = spec.get("granularity")
    text = str(spec.get("format"))
    if isinstance(granularity, Mapping):
        text += f"/{granularity.get('kind')}"
        size = granularity.get("size")
        text += f"[{size}]" if size is not None else ""
    text += "/dynamic" if spec.get("dynamic") else ""
    then = spec.get("then")
    return f"{text}, then {_spec(then)}" if then is not None else text
