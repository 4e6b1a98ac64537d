"""Operators in which every coordinate may take part in every result."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis
from bittern.tracing.flow.graph import OpNode
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = ["closed"]


def closed(node: OpNode, flow: Flow, why: str = "its coordinates are mixed") -> list[Axes | None]:
    """Nothing may move in what it reads or makes.

    Args:
        node: The node.
        flow: The pass.
        why: What it does to coordinates.
    """
    for value in node.inputs():
        for axis in flow.of(value):
            axis.fix(f"{why} ({flow.where(node)})")
    return [
        None if value is None else tuple(Axis(n, fixed="data") for n in value.shape)
        for value in node.outputs
    ]
