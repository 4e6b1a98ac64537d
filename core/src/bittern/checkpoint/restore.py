"""Restores a saved state into a fresh model: the same classes, quantizers and bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bittern.checkpoint.manifest import TENSORS, Entry, Manifest, spec_from
from bittern.checkpoint.save import QUANTIZERS
from bittern.convert import convert, remember
from bittern.errors import BitternError, CheckpointError
from bittern.nn import named_quantizers, original_class, quantizer_keys
from bittern.nn.computed import weight_of
from bittern.planning import slots_of
from bittern.records import ModuleRule, Plan, PlanEntry
from bittern.registry import ClassTable, Match, Registry
from bittern.registry.targets import bound

__all__ = ["restore_state"]


def restore_state(
    model: nn.Module,
    path: Path,
    registry: Registry,
    modules: ClassTable[ModuleRule],
    *,
    after_convert: Callable[[Plan], None] | None = None,
) -> None:
    """Quantize ``model`` as the saved one was, and load its tensors.

    Args:
        model: A model of the saved one's architecture, quantized or not.
        path: What `save_state` wrote.
        registry: Formats and kernels.
        modules: Module rules, those that only the live model shows included.
        after_convert: Called before the tensors are loaded; plugins fix up what the swap disturbed.

    Raises:
        CheckpointError: The state is damaged, needs a plugin that is missing, or does not fit the
            model; the model is then what it was.
    """
    manifest = Manifest.read(path)
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{TENSORS} cannot be read: {error}", where=str(path)) from error
    plan = _plan(model, manifest, registry, modules, where=str(path))
    weights = {name: t for name, t in tensors.items() if not name.startswith(QUANTIZERS)}
    weights |= {name: weights[kept] for name, kept in manifest.aliases.items() if kept in weights}
    _check_fit(model, weights, where=str(path))
    states = _states(tensors, _device(model))
    undo = remember(model)
    try:
        convert(model, plan, registry)
        if after_convert is not None:
            after_convert(plan)
        for name, quantizer in named_quantizers(model):
            quantizer.load_state(states.get(name, {}))
        model.load_state_dict(weights)
        for name, _ in plan.algorithm:
            if name in registry.algorithms and (step := registry.algorithms.get(name)).restore:
                bound(step.restore, plugin=registry.algorithms.plugin(name))(model)
    except (BitternError, RuntimeError) as error:
        undo()
        raise CheckpointError(f"it does not fit this model: {error}", where=str(path)) from error


def _states(tensors: dict[str, Tensor], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Return what every quantizer found out, by its name."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(QUANTIZERS):
            name, _, local = key.removeprefix(QUANTIZERS).rpartition("/")
            states.setdefault(name, {})[local] = value.to(device)
    return states


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _check_fit(model: nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Compare names and shapes before anything is changed."""
    learned = quantizer_keys(model)
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and name not in learned
    }
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(tensor.shape)} here and {tuple(weights[name].shape)} there"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"it is the state of another model: {'; '.join(problems[:3])}",
            where=where,
            hint="restore into a model of the same architecture",
        )


def _plan(
    model: nn.Module,
    manifest: Manifest,
    registry: Registry,
    modules: ClassTable[ModuleRule],
    *,
    where: str,
) -> Plan:
    entries: list[PlanEntry] = []
    classes: dict[str, str] = {}
    live = dict(model.named_modules())
    for entry in manifest.entries:
        if entry.module not in live:
            raise CheckpointError(
                f"it quantizes {entry.module!r}, which this model does not have", where=where
            )
        module = live[entry.module]
        match = modules.find(module, original_class(module))
        if not isinstance(match, Match) or match.rule.quantized is None:
            raise _missing(entry, where)
        slot = next((s for s in slots_of(match, module) if s.name == entry.slot), None)
        if slot is None:
            raise _missing(entry, where)
        try:
            spec = spec_from(entry.spec, registry.formats)
        except BitternError as error:
            raise CheckpointError(error.what, where=where, hint=error.hint) from error
        tensor = weight_of(module, slot.tensor or slot.name) if slot.kind == "weight" else None
        entries.append(
            PlanEntry(
                module=entry.module,
                slot=entry.slot,
                spec=spec,
                rule=match.rule.target,
                plugin=match.plugin,
                kind=slot.kind,
                slot_rule=slot,
                shape=tuple(tensor.shape) if isinstance(tensor, Tensor) else None,
            )
        )
        classes[entry.module] = match.rule.quantized
    return Plan(
        recipe=manifest.recipe,
        entries=tuple(entries),
        skipped={},
        algorithm=tuple((name, options) for name, options in manifest.algorithm),
        classes=classes,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _missing(entry: Entry, where: str) -> CheckpointError:
    distribution = entry.plugin.partition(" ")[0]
    return CheckpointError(
        f"{entry.module} was quantized by the rule of {entry.plugin} for {entry.rule}, and no "
        "loaded plugin has one for it",
        where=where,
        hint=f"pip install {distribution}",
    )
