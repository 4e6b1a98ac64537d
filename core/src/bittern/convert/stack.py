"""The mode stack: what was done to a model, in order, kept on the model itself.

It is an attribute of the model that wrappers are taken off, so it goes where the model goes: into
wrappers and out of them, and into copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from bittern.convert.names import unwrapped, wrappers
from bittern.errors import PlanError
from bittern.records import AppliedMode

__all__ = [
    "CONVERSIONS",
    "PLAN",
    "STACK",
    "amend_mode",
    "carrier",
    "drop_modes",
    "modes_of",
    "push_mode",
]

STACK = "_bittern_modes"
PLAN = "_bittern_plan"
# The modes that `revert` undoes.
CONVERSIONS = frozenset({"quantize", "fold", "compress"})


def carrier(model: nn.Module, attribute: str = STACK) -> nn.Module | None:
    """Return the module that carries a stack or a plan: the model without its wrappers.

    Args:
        model: A model, or what wraps it.
        attribute: `STACK` or `PLAN`.

    Raises:
        PlanError: It is not the model itself but a part of it, or there are several.
    """
    found = [(name, m) for name, m in model.named_modules() if attribute in vars(m)]
    whole = {id(m) for m in wrappers(model)}
    parts = [name for name, m in found if id(m) not in whole]
    if parts or len(found) > 1:
        raise PlanError(
            f"parts of the model were converted on their own: {', '.join(parts[:3])}",
            hint="work with the part, as model.get_submodule(name), or convert the whole model",
        )
    return found[0][1] if found else None


def modes_of(model: nn.Module) -> tuple[AppliedMode, ...]:
    """Return the modes that were applied to a model, the first first.

    Args:
        model: A model, a copy of it, or what wraps it.

    Raises:
        PlanError: Parts of the model have stacks of their own.
    """
    found = carrier(model)
    stack: tuple[AppliedMode, ...] = () if found is None else vars(found)[STACK]
    return stack


def push_mode(model: nn.Module, applied: AppliedMode, *, exclusive: bool = False) -> None:
    """Put a mode on top of the stack.

    Args:
        model: The model.
        applied: The mode.
        exclusive: Whether an earlier one of that name goes.
    """
    found = carrier(model)
    home = unwrapped(model) if found is None else found
    kept = [m for m in modes_of(model) if not (exclusive and m.name == applied.name)]
    _set(home, (*kept, applied))


def amend_mode(
    model: nn.Module,
    name: str,
    *,
    config: Mapping[str, object] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Add to what the latest mode of a name says about itself; without one, do nothing.

    Args:
        model: The model.
        name: The mode's name.
        config: Further options.
        metadata: Further metadata.
    """
    stack = list(modes_of(model))
    found = carrier(model)
    for index in reversed(range(len(stack))):
        if stack[index].name == name and found is not None:
            old = stack[index]
            stack[index] = replace(
                old,
                config={**old.config, **(config or {})},
                metadata={**old.metadata, **(metadata or {})},
            )
            _set(found, tuple(stack))
            return


def drop_modes(model: nn.Module, names: frozenset[str] = CONVERSIONS) -> None:
    """Take modes off the stacks of a model and its parts, wherever they are in it."""
    for module in model.modules():
        if STACK in vars(module):
            _set(module, tuple(m for m in vars(module)[STACK] if m.name not in names))


def _set(module: nn.Module, stack: tuple[AppliedMode, ...]) -> None:
    holder: Any = module
    if stack:
        setattr(holder, STACK, stack)
    elif STACK in vars(module):
        delattr(holder, STACK)
