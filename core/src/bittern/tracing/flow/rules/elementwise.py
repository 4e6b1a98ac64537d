"""Operators that work element by element: the axes of everything they read become one."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis
from bittern.tracing.flow.graph import OpNode, Value, values_in
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = [
    "complex_view",
    "copy",
    "elementwise",
    "glu",
    "identity",
    "masked_scatter",
    "per_channel",
    "prelu",
    "real_view",
]


def identity(node: OpNode, flow: Flow) -> Axes | list[Axes | None]:
    """The first argument goes through: casts, copies, dropout, in-place fills."""
    axes = flow.of(node.tensor(0))
    return [axes if value is not None else None for value in node.outputs]


def elementwise(node: OpNode, flow: Flow) -> Axes | list[Axes | None]:
    """All tensors are broadcast against each other."""
    every = [flow.of(value) for value in node.inputs()]
    axes = flow.broadcast(every, node.out.shape)
    return axes if len(node.outputs) == 1 else [axes for _ in node.outputs]


def copy(node: OpNode, flow: Flow) -> Axes:
    """``copy_(self, src)``: the source is broadcast into the target."""
    target = flow.of(node.tensor(0))
    flow.broadcast([target, flow.of(node.tensor(1))], node.tensor(0).shape)
    return target


def prelu(node: OpNode, flow: Flow) -> Axes:
    """``prelu(x, weight)``: one slope per channel, or one for all."""
    axes, slope = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    if slope and slope[0].size > 1:
        flow.same(axes[1], slope[0])
    return axes


def per_channel(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``fake_quantize_per_channel_affine(x, scale, zero_point, axis)`` and its kin."""
    axes = flow.of(node.tensor(0))
    for k in (1, 2):
        flow.same(axes[node.args[3]], flow.of(node.tensor(k))[0])
    return [axes for _ in node.outputs]


def glu(node: OpNode, flow: Flow) -> Axes:
    """``glu(x, dim)``: the first half times the gate of the second."""
    axes = list(flow.of(node.tensor(0)))
    dim = node.arg(1, "dim", -1) % len(axes)
    half = axes[dim].size // 2
    value, gate = flow.divide(axes[dim], (half, half), flow.where(node))
    axes[dim] = flow.same(value, gate)
    return tuple(axes)


def complex_view(node: OpNode, flow: Flow) -> Axes:
    """``view_as_complex(x)``: the last dimension holds real and imaginary part."""
    *axes, pair = flow.of(node.tensor(0))
    pair.fix("it holds real and imaginary parts")
    return tuple(axes)


def real_view(node: OpNode, flow: Flow) -> Axes:
    """``view_as_real(x)``."""
    return (*flow.of(node.tensor(0)), Axis(2, fixed="it holds real and imaginary parts"))


def masked_scatter(node: OpNode, flow: Flow) -> Axes:
    """``masked_scatter(x, mask, source)``: elements of the source, in order, where the mask says.

    A mask that is the same along the last dimension moves whole rows.
    """
    axes, source = flow.of(node.tensor(0)), flow.of(node.tensor(2))
    rows = _constant_along_last(node.tensor(1)) and source and axes[-1].size == source[-1].size
    mask = flow.of(node.tensor(1))
    for axis in (*axes[:-1], *mask[:-1], *source[:-1]) if rows else (*axes, *mask, *source):
        axis.fix(f"elements are placed by a mask ({flow.where(node)})")
    made = flow.broadcast([axes, mask], node.out.shape)
    return (*made[:-1], flow.same(made[-1], source[-1])) if rows else made


def _constant_along_last(value: Value) -> bool:
    while value.producer is not None:
        if not value.shape:
            return False
        op = value.producer.op.split(".")[1]
        before = next(values_in(value.producer.args), None)
        if before is None:
            return False
        if op in ("expand", "expand_as", "broadcast_to"):
            return before.shape[-1:] == (1,) and value.shape[-1] > 1
        if op not in ("to", "_to_copy", "alias", "detach", "contiguous", "clone"):
            return False
        value = before
    return False
