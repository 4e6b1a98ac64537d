"""manifest.json: what was done to a model, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bittern.errors import CheckpointError
from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Plan,
)

__all__ = ["FILE", "TENSORS", "Entry", "Manifest", "granularity_from", "granularity_to"]

FILE = "manifest.json"
TENSORS = "state.safetensors"
SCHEMA = 1
_KINDS: dict[str, type[Granularity]] = {
    "tensor": PerTensor,
    "channel": PerChannel,
    "token": PerToken,
    "group": PerGroup,
    "block": PerBlock,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One quantizer.

    Attributes:
        module: Dotted path of the module.
        slot: Name of the slot.
        format: Name of the number format.
        granularity: See `granularity_to`.
        dynamic: Whether scales are computed from each tensor.
        rule: Target string of the module rule.
        plugin: Label of the plugin that registered it.
    """

    module: str
    slot: str
    format: str
    granularity: dict[str, Any]
    dynamic: bool
    rule: str
    plugin: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        bittern: Version of core that wrote it.
        recipe: Name of the recipe.
        entries: The quantizers.
        algorithm: Calibration steps with their options.
        plugins: Distribution to version of the plugins whose rules were used.
        aliases: Tensor name to the name of the tensor it shares storage with.
        schema: Version of this layout.
    """

    bittern: str
    recipe: str
    entries: list[Entry] = field(default_factory=list)
    algorithm: list[list[Any]] = field(default_factory=list)
    plugins: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def write(self, directory: Path) -> None:
        """Write manifest.json."""
        text = json.dumps(asdict(self), indent=1)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read manifest.json.

        Raises:
            CheckpointError: It is missing, malformed, or newer than this version.
        """
        file = directory / FILE
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"there is no {FILE}", where=str(directory), hint="give what bittern.save wrote"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"not JSON: {error}", where=str(file)) from error
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
            raise CheckpointError("malformed: no schema", where=str(file))
        if data["schema"] > SCHEMA:
            raise CheckpointError(
                f"written by bittern {data.get('bittern')}, which is newer than this one",
                where=str(file),
                hint="pip install -U bittern",
            )
        try:
            entries = [Entry(**entry) for entry in data.pop("entries")]
            manifest = cls(**data, entries=entries)
            _check_types(manifest)
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"malformed: {error}", where=str(file)) from error
        return manifest


def _check_types(manifest: Manifest) -> None:
    for entry in manifest.entries:
        for item in fields(entry):
            value = getattr(entry, item.name)
            wanted = {"granularity": dict, "dynamic": bool}.get(item.name, str)
            if not isinstance(value, wanted):
                raise TypeError(f"{item.name} of {entry.module} is {value!r}")
    for name in ("plugins", "aliases"):
        if not isinstance(getattr(manifest, name), dict):
            raise TypeError(f"{name} is no mapping")


def granularity_to(granularity: Granularity) -> dict[str, Any]:
    """Return a granularity as ``{"kind": "group", "size": 128}``."""
    kind = next(name for name, cls in _KINDS.items() if type(granularity) is cls)
    return {"kind": kind, **asdict(granularity)}


def granularity_from(data: dict[str, Any]) -> Granularity:
    """Undo `granularity_to`.

    Raises:
        CheckpointError: It is malformed.
    """
    rest = dict(data)
    try:
        found: Granularity = _KINDS[rest.pop("kind")](**rest)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"unknown granularity {data!r}") from error
    return found


def entries_of(plan: Plan) -> list[Entry]:
    """Return a plan's entries for the manifest."""
    return [
        Entry(
            module=e.module,
            slot=e.slot,
            format=e.format,
            granularity=granularity_to(e.granularity),
            dynamic=e.spec.dynamic,
            rule=e.rule,
            plugin=e.plugin,
        )
        for e in plan.entries
    ]
