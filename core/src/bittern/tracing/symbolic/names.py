"""Finds all that an operation is called by, once: functions, operators, methods, modules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bittern.tracing.symbolic.dependencies import NodeProcessor, Step

__all__ = ["TableProcessor", "module_types", "operations"]

Handler = Callable[[Step], Any]


def operations(names: Iterable[str]) -> set[Any]:
    """Return the functions and method names of operations, the in-place ones included."""
    found: set[Any] = set()
    for name in names:
        for spelled in (name, f"{name}_"):
            found.add(spelled)
            for space in (torch, F, torch.Tensor, operator, torch.special):
                function = getattr(space, spelled, None)
                if callable(function):
                    found.add(function)
    return found


def module_types(names: Iterable[str]) -> set[type[nn.Module]]:
    """Return the classes of ``torch.nn`` of these names."""
    return {getattr(nn, name) for name in names if hasattr(nn, name)}


class TableProcessor(NodeProcessor):
    """Nodes by what they call: a function, the name of a method, the class of a module.

    Args:
        table: What is called, to what it does to widths.
        ties_out: Whether the handlers tie the widths of an ``out=`` argument too.
    """

    def __init__(self, table: Mapping[Any, Handler], *, ties_out: bool = False) -> None:
        self._table = table
        self.ties_out = ties_out

    @classmethod
    def of(cls, *groups: tuple[Iterable[Any], Handler], ties_out: bool = False) -> TableProcessor:
        """Make a table from groups of things that are called; the first group wins."""
        table: dict[Any, Handler] = {}
        for called, handler in groups:
            for target in called:
                table.setdefault(target, handler)
        return cls(table, ties_out=ties_out)

    def matches(self, step: Step) -> bool:
        """Take what is in the table."""
        return self._key(step) in self._table

    def process(self, step: Step) -> Any:
        """Do what the table says."""
        result = self._table[self._key(step)](step)
        out = step.node.kwargs.get("out")
        if isinstance(out, fx.Node):
            # What it held is overwritten; an element by element operation ties both.
            if not self.ties_out:
                result = step.boundary("writes into another tensor")
            step.walk.values[out] = result
        return result

    @staticmethod
    def _key(step: Step) -> Any:
        if step.node.op == "call_module":
            return type(step.target)
        return step.target if step.node.op in ("call_function", "call_method") else None
