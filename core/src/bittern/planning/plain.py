"""Specs and plan entries as plain data, for files, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bittern.errors import CheckpointError
from bittern.planning.specs import with_options
from bittern.records import (
    Affine,
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Rotation,
)
from bittern.registry import NamedTable

__all__ = ["granularity_from", "granularity_to", "spec_from", "spec_to"]

_KINDS: dict[str, type[Granularity]] = {
    "tensor": PerTensor,
    "channel": PerChannel,
    "token": PerToken,
    "group": PerGroup,
    "block": PerBlock,
}


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


def spec_from(data: Mapping[str, Any], formats: NamedTable[NumberFormat]) -> QuantizerSpec:
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


def granularity_from(data: Mapping[str, Any]) -> Granularity:
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
