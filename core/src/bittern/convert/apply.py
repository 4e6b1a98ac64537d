"""Applies a plan: swaps classes in place and attaches quantizers. Nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from bittern.convert.names import unwrapped
from bittern.convert.originals import plain_weights
from bittern.convert.signatures import check_forward
from bittern.convert.stack import PLAN, carrier, drop_modes, push_mode
from bittern.errors import PlanError
from bittern.nn import (
    QuantModule,
    TensorQuantizer,
    named_quant_modules,
    original_class,
    restore_class,
)
from bittern.nn.computed import check_unchanged
from bittern.nn.module import SUFFIX, swap_class
from bittern.records import AppliedMode, Plan
from bittern.registry import ANY, Registry, resolve, target_of

__all__ = ["convert", "plan_of", "revert"]


def convert(model: nn.Module, plan: Plan, registry: Registry) -> None:
    """Convert ``model`` in place.

    Modules that an earlier plan converted are reverted first. Every class is resolved before the
    first module changes, so a plugin's mistake leaves the model as it was.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        registry: Gives the kernels.

    Raises:
        PluginError: A rule's quantized class does not resolve, or takes other arguments.
        PlanError: The plan is for another model, a quantized class is no QuantModule, or a module
            has something of its own where a quantizer belongs.
    """
    modules = dict(model.named_modules())
    by_module = plan.by_module()
    plugins = {entry.module: entry.plugin for entry in plan.entries}
    targets = {entry.module: entry.rule for entry in plan.entries}
    classes: dict[str, type[QuantModule]] = {}
    for path, slots in by_module.items():
        if path not in modules:
            raise PlanError(
                f"the plan names {path!r}, which this model does not have",
                hint="make the plan from this very model",
            )
        own = original_class(modules[path])
        target = targets[path]
        if target != ANY and target not in map(target_of, own.__mro__):
            raise PlanError(
                f"the plan takes it for a {target}, and it is a {own.__qualname__}",
                where=path,
                hint="make the plan from this very model",
            )
        found = resolve(plan.classes[path], plugin=plugins[path])
        if not (isinstance(found, type) and issubclass(found, QuantModule)):
            raise PlanError(
                f"{plan.classes[path]} of plugin {plugins[path]} is no QuantModule",
                where=path,
                hint="derive it from bittern.nn.QuantModule",
            )
        check_forward(found, own, plugin=plugins[path], where=path)
        _check_free(modules[path], slots, where=path)
        classes[path] = found
    revert(model)
    kernels = registry.kernels
    for path, slots in by_module.items():
        quantizers = {
            slot: TensorQuantizer(
                entry.spec,
                name=f"{path}.{slot}" if path else slot,
                tensor=entry.tensor,
                kernels=kernels,
            )
            for slot, entry in slots.items()
        }
        swap_class(modules[path], classes[path], quantizers)
    home = unwrapped(model)
    path = next(path for path, module in modules.items() if module is home)
    vars(home)[PLAN] = _within(plan, path)
    push_mode(
        model,
        AppliedMode(name="quantize", plugin="bittern", config={"recipe": plan.recipe}),
        exclusive=True,
    )


def _within(plan: Plan, path: str) -> Plan:
    """Return the plan of a wrapper as that of the model within, which is at ``path``."""
    if not path:
        return plan
    return replace(
        plan,
        entries=tuple(replace(e, module=_below(path, e.module)) for e in plan.entries),
        skipped={_below(path, name): why for name, why in plan.skipped.items()},
        classes={_below(path, name): cls for name, cls in plan.classes.items()},
    )


def _below(path: str, name: str) -> str:
    return "" if name == path else name.removeprefix(f"{path}.")


def _check_free(module: nn.Module, slots: Iterable[str], *, where: str) -> None:
    """Refuse to put a quantizer in the place of an attribute that is the module's own."""
    ours = module.slots() if isinstance(module, QuantModule) else {}
    for slot in slots:
        name = slot + SUFFIX
        if slot not in ours and hasattr(module, name):
            raise PlanError(
                f"it has something of its own under the name {name}, where a quantizer belongs",
                where=where or None,
                hint="rename it, or leave the module out of the recipe",
            )


def plan_of(model: nn.Module) -> Plan:
    """Return the plan a model, or what a wrapper holds, was converted with.

    Raises:
        PlanError: The model is not quantized.
    """
    found = carrier(model, PLAN)
    if found is None:
        raise PlanError(
            "this model is not quantized", hint="call bittern.quantize(model, recipe) first"
        )
    plan: Plan = vars(found)[PLAN]
    return plan


def revert(model: nn.Module) -> None:
    """Give every converted module its original class back and remove the quantizers.

    Parameters stay what they are, but for those that were folded or packed, see `plain_weights`.

    Raises:
        ModelError: The class of a module was changed after conversion; nothing is reverted then.
    """
    converted = list(named_quant_modules(model))
    for path, module in converted:
        check_unchanged(module, where=path)
    if converted:
        plain_weights(model)
    for _, module in converted:
        restore_class(module)
    drop_modes(model)
    for part in model.modules():
        vars(part).pop(PLAN, None)
