"""Undoes changes of a model's structure: classes, modules, parameters, attributes, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bittern.convert.originals import folded_data

__all__ = ["remember"]


def remember(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives every module back what it holds now.

    The very same parameters, buffers and children come back, whatever was put in their place, and
    they are trained or not as before; what was written into a tensor in place stays written. Folded
    weights are folded again. The generator of random numbers on the CPU goes back too.
    """
    random = torch.get_rng_state()
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(module, type(module), _copied(vars(module))) for module in model.modules()]

    fold_again = folded_data(model)

    def undo() -> None:
        for module, cls, attributes in before:
            kind: Any = cls
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(_copied(attributes))
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        fold_again()
        torch.set_rng_state(random)

    return undo


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy the attributes of a module, and torch's dicts of parameters, children and hooks."""
    return {
        name: value.copy() if isinstance(value, dict) and name.startswith("_") else value
        for name, value in attributes.items()
    }
