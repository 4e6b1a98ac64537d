"""From what was chosen to a recipe that says it: the other way round of `bittern.planning`."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from typing import Any

from bittern.config import SpecModel
from bittern.errors import BitternError
from bittern.planning.specs import resolve_spec
from bittern.records import (
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PlanEntry,
    QuantizerSpec,
    Slot,
)
from bittern.registry import NamedTable

__all__ = ["recipe_of", "slots_data"]

PLAIN = ("weight", "input", "output")  # slots that have a recipe key of their own
SlotsData = Mapping[str, Any]


def slots_data(slots: Mapping[str, PlanEntry], formats: NamedTable[NumberFormat]) -> dict[str, Any]:
    """Return what a recipe has to say of a module's slots, as short as it can be said."""
    return {name: _shortest(e.spec, e.slot_rule, formats) for name, e in slots.items()}


def recipe_of(
    modules: Mapping[str, SlotsData], *, name: str, description: str, algorithm: list[Any]
) -> dict[str, Any]:
    """Return a recipe that quantizes some modules, named one by one, and nothing else.

    Args:
        modules: Path to what is said of the module's slots.
        name: Name of the recipe.
        description: One line for people.
        algorithm: Calibration steps.
    """
    alike: dict[str, list[str]] = {}
    for path, slots in modules.items():
        alike.setdefault(json.dumps(slots, sort_keys=False), []).append(path)
    rules = []
    for text, paths in alike.items():
        said = json.loads(text)
        rule: dict[str, Any] = {"match": {"name": [glob.escape(path) for path in paths]}}
        if set(said) <= set(PLAIN):
            rule |= said
        else:
            rule["slots"] = said
        rules.append(rule)
    return {
        "name": name,
        "description": description,
        "rules": rules,
        "skip": [],
        "algorithm": algorithm,
    }


def _shortest(spec: QuantizerSpec, slot: Slot, formats: NamedTable[NumberFormat]) -> Any:
    """Return a spec as a recipe says it, without what would be so anyway."""
    whole = _said(spec, slot)
    for key in ("dynamic", "granularity"):
        parts = {key} if key == "dynamic" else {key, "axis", "size", "rows", "cols"}
        shorter = {k: v for k, v in whole.items() if k not in parts}
        if _resolves_to(shorter, spec, slot, formats):
            whole = shorter
    return whole["format"] if set(whole) == {"format"} else whole


def _resolves_to(
    said: Mapping[str, Any], spec: QuantizerSpec, slot: Slot, formats: NamedTable[NumberFormat]
) -> bool:
    try:
        return resolve_spec(SpecModel.model_validate(said), slot, formats, where="") == spec
    except (BitternError, ValueError):
        return False


def _said(spec: QuantizerSpec, slot: Slot) -> dict[str, Any]:
    found: dict[str, Any] = {"format": spec.format.name}
    if spec.format.options:
        found["options"] = {
            k: list(v) if isinstance(v, tuple) else v for k, v in spec.format.options.items()
        }
    found |= _granularity(spec, slot)
    found["dynamic"] = spec.dynamic
    if spec.constant_amax is not None:
        found["amax"] = spec.constant_amax
    if (rotation := spec.rotation) is not None:
        said = {"kind": rotation.kind, "block": rotation.block, "back": rotation.back}
        found["rotate"] = {k: v for k, v in said.items() if v is not None}
    if (affine := spec.affine) is not None:
        axes = list(affine.axes)
        found["affine"] = {"axes": axes, "method": affine.method, "dynamic": affine.dynamic}
    if spec.backend is not None:
        found["backend"] = spec.backend
    if spec.then is not None:
        found["then"] = _said(spec.then, slot)
    return found


def _granularity(spec: QuantizerSpec, slot: Slot) -> dict[str, Any]:
    match spec.granularity:
        case PerTensor():
            return {"granularity": "tensor"}
        case PerChannel(axes=axes):
            if spec.stacked and slot.kind == "weight":  # one per expert goes without saying
                axes = tuple(axis for axis in axes if axis != 0)
                if not axes:
                    return {"granularity": "tensor"}
            return {"granularity": "channel", "axis": axes[0] if len(axes) == 1 else list(axes)}
        case PerGroup(size=size, axis=axis):
            return {"granularity": "group", "size": size, "axis": axis}
        case PerBlock(rows=rows, cols=cols):
            return {"granularity": "block", "rows": rows, "cols": cols}
        case _:
            return {"granularity": "token"}
