"""Undoes changes of a model's structure: classes, modules, parameters, attributes, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bittern.convert.originals import folded_data

__all__ = ["remember"]


def remember(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives every module back what it holds now.

    The very same parameters, buffers and children come back, whatever was put in their place; what
    was written into a tensor in place stays written. Folded weights are folded again.
    """
    before = [(module, type(module), _copied(vars(module))) for module in model.modules()]

    fold_again = folded_data(model)

    def undo() -> None:
        for module, cls, attributes in before:
            kind: Any = cls
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(_copied(attributes))
        fold_again()

    return undo


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy the attributes of a module, and torch's dicts of parameters, children and hooks."""
    return {
        name: value.copy() if isinstance(value, dict) and name.startswith("_") else value
        for name, value in attributes.items()
    }
