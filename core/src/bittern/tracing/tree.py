"""The trace as a tree of modules: what each dimension of each weight is made of."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from torch import nn

from bittern.tracing.explain import describe
from bittern.tracing.flow import Axis

if TYPE_CHECKING:
    from bittern.tracing.trace import Trace

__all__ = ["to_tree"]


def to_tree(trace: Trace) -> str:
    """Return the weight-bearing modules as an indented tree; equal neighbours take one line.

    A dimension is written as what it is made of, outer factor first: ``2 x 2 x (8 + 8)``. ``!``
    marks what may not be changed.
    """
    return "\n".join(_lines(trace, trace.model, "", type(trace.model).__name__)) + "\n"


def _lines(trace: Trace, module: nn.Module, path: str, label: str) -> list[str]:
    own = [
        _tensor(trace, name, f"{path}.{name}" if path else name)
        for name, _ in module.named_parameters(recurse=False)
    ]
    lines = ["  ".join([label, *own])]
    blocks: list[tuple[str, list[str]]] = []
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            below = _lines(trace, child, f"{path}.{name}" if path else name, type(child).__name__)
            blocks.append((name, below))
    for below, same in groupby(blocks, key=lambda block: block[1]):
        names = [name for name, _ in same]
        numbered = len(names) > 1 and all(name.isdigit() for name in names)
        for shown in [f"{{{names[0]}..{names[-1]}}}"] if numbered else names:
            lines.append(f"  {shown}: {below[0]}")
            lines.extend(f"  {line}" for line in below[1:])
    return lines


def _tensor(trace: Trace, name: str, full: str) -> str:
    value = trace.flow.graph.find(full)
    if value is None:
        return f"{name} (not read)"
    same = f" = {value.name}" if value.name != full else ""
    return f"{name} [{', '.join(_dim(axis) for axis in trace.flow.of(value))}]{same}"


def _dim(axis: Axis) -> str:
    fixed = all(leaf.mark.fixed for leaf in axis.leaves()) and axis.size > 1
    return describe(axis) + "!" * fixed
