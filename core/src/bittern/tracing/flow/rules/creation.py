"""Operators that make tensors from nothing."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis
from bittern.tracing.flow.graph import OpNode
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = ["counted", "data", "like", "uniform"]


def uniform(node: OpNode, flow: Flow) -> Axes:
    """``zeros``, ``ones``, ``full``: all coordinates are alike."""
    return tuple(Axis(n) for n in node.out.shape)


def like(node: OpNode, flow: Flow) -> Axes:
    """``zeros_like(x)``: as uniform, and of ``x``'s shape."""
    return flow.of(node.tensor(0))


def counted(node: OpNode, flow: Flow) -> Axes:
    """``arange``, ``linspace``: coordinates are numbered."""
    return tuple(Axis(n, fixed=f"it is numbered ({flow.where(node)})") for n in node.out.shape)


def data(node: OpNode, flow: Flow) -> list[Axes | None]:
    """Random numbers, literal tensors: nothing is known about their coordinates."""
    return [
        None if v is None else tuple(Axis(n, fixed="data") for n in v.shape) for v in node.outputs
    ]
