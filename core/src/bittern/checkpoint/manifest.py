"""manifest.json: what was done to a model, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bittern.errors import CheckpointError
from bittern.planning import with_options
from bittern.records import (
    Affine,
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Plan,
    QuantizerSpec,
    Rotation,
)
from bittern.registry import NamedTable

__all__ = [
    "FILE",
    "TENSORS",
    "Entry",
    "Manifest",
    "granularity_from",
    "granularity_to",
    "spec_from",
    "spec_to",
]

FILE = "manifest.json"
TENSORS = "state.safetensors"
SCHEMA = 2
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
        spec: How it is quantized, see `spec_to`.
        rule: Target string of the module rule.
        plugin: Label of the plugin that registered it.
    """

    module: str
    slot: str
    spec: dict[str, Any]
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
        if data["schema"] < SCHEMA:
            raise CheckpointError(
                f"written by bittern {data.get('bittern')}, in a layout that is no longer read",
                where=str(file),
                hint="quantize the model again",
            )
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
            wanted = dict if item.name == "spec" else str
            if not isinstance(value, wanted):
                raise TypeError(f"{item.name} of {entry.module} is {value!r}")
    for name in ("plugins", "aliases"):
        if not isinstance(getattr(manifest, name), dict):
            raise TypeError(f"{name} is no mapping")


def spec_to(spec: QuantizerSpec) -> dict[str, Any]:
    """Return a spec as plain data; what is left at its default is left out."""
    found: dict[str, Any] = {
        "format": spec.format.name,
        "granularity": granularity_to(spec.granularity),
    }
    if spec.format.options:
        found["options"] = dict(spec.format.options)
    for name in ("dynamic", "stacked", "backend", "constant_amax"):
        value = getattr(spec, name)
        if value not in (None, False):
            found[name] = value
    if spec.rotation is not None:
        found["rotation"] = asdict(spec.rotation)
    if spec.affine is not None:
        found["affine"] = {**asdict(spec.affine), "axes": list(spec.affine.axes)}
    if spec.then is not None:
        found["then"] = spec_to(spec.then)
    return found


def spec_from(data: dict[str, Any], formats: NamedTable[NumberFormat]) -> QuantizerSpec:
    """Undo `spec_to`.

    Raises:
        CheckpointError: It is malformed, or names an unknown format.
    """
    rest = dict(data)
    try:
        number_format = with_options(formats.get(rest.pop("format")), rest.pop("options", {}))
        granularity = granularity_from(rest.pop("granularity"))
        rotation, affine, then = (rest.pop(name, None) for name in ("rotation", "affine", "then"))
        return QuantizerSpec(
            number_format,
            granularity,
            rotation=None if rotation is None else Rotation(**rotation),
            affine=None if affine is None else Affine(**{**affine, "axes": tuple(affine["axes"])}),
            then=None if then is None else spec_from(then, formats),
            **rest,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"malformed spec {data!r}: {error}") from error


def granularity_to(granularity: Granularity) -> dict[str, Any]:
    """Return a granularity as ``{"kind": "group", "size": 128, "axis": -1}``."""
    kind = next(name for name, cls in _KINDS.items() if type(granularity) is cls)
    return {"kind": kind, **asdict(granularity)}


def granularity_from(data: dict[str, Any]) -> Granularity:
    """Undo `granularity_to`.

    Raises:
        CheckpointError: It is malformed.
    """
    rest = dict(data)
    if isinstance(rest.get("axis"), list):  # JSON has no tuples
        rest["axis"] = tuple(rest["axis"])
    try:
        found: Granularity = _KINDS[rest.pop("kind")](**rest)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"unknown granularity {data!r}") from error
    return found


def entries_of(plan: Plan) -> list[Entry]:
    """Return a plan's entries for the manifest."""
    return [
        Entry(module=e.module, slot=e.slot, spec=spec_to(e.spec), rule=e.rule, plugin=e.plugin)
        for e in plan.entries
    ]
