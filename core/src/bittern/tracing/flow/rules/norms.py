"""Normalisations: they keep axes and compute statistics over some of them."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = ["batch_norm", "group_norm", "layer_norm", "native_group_norm", "softmax", "weight_norm"]


def _who(node: OpNode) -> str:
    return node.module or "the model"


def _channel(node: OpNode, flow: Flow, axis: Axis, positions: range) -> None:
    for k in positions:
        if k < len(node.args) and isinstance(node.args[k], Value):
            flow.same(axis, flow.of(node.args[k])[0])


def batch_norm(
    node: OpNode, flow: Flow, computes: int | None = 5, first: int = 0
) -> list[Axes | None]:
    """``batch_norm(x, weight, bias, mean, var)``, ``instance_norm``: nothing crosses channels.

    Args:
        node: The node.
        flow: The pass.
        computes: Which argument says whether statistics are computed, ``None`` if they never are.
        first: The first dimension over which they are, channels aside.
    """
    axes = flow.of(node.tensor(0))
    if len(axes) == 1:  # torch takes an empty vector
        return [axes, *(None for _ in node.outputs[1:])]
    _channel(node, flow, axes[1], range(1, 5))
    if computes is not None and node.arg(computes, "", False):
        for axis in (*axes[first:1], *axes[2:]):
            axis.normalize(_who(node))
    fits = [v is not None and v.shape == (axes[1].size,) for v in node.outputs[1:]]
    return [axes, *((axes[1],) if fit else None for fit in fits)]


def layer_norm(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``layer_norm``, ``rms_norm(x, shape, weight, bias)``: statistics over the last dimensions."""
    axes = flow.of(node.tensor(0))
    count = len(node.args[1])
    for axis in axes[-count:]:
        axis.normalize(_who(node))
    every = [node.arg(2, "weight"), node.arg(3, "bias")]
    for value in every:
        if isinstance(value, Value):
            flow.together([axes[-count:], flow.of(value)])
    statistics = (*axes[:-count], *(Axis(1) for _ in range(count)))
    return [axes, *(statistics for _ in node.outputs[1:])]


def group_norm(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``group_norm(x, groups, weight, bias)``: channels are ``groups x within``."""
    return _group_norm(node, flow, node.args[1], range(2, 4))


def native_group_norm(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``native_group_norm(x, weight, bias, N, C, space, groups, eps)``."""
    return _group_norm(node, flow, node.args[6], range(1, 3))


def _group_norm(node: OpNode, flow: Flow, groups: int, own: range) -> list[Axes | None]:
    axes = flow.of(node.tensor(0))
    channels = axes[1]
    group, within = Axis(1), channels
    if groups > 1:
        sizes = (groups, channels.size // groups)
        group, within = flow.factor(channels, sizes, flow.where(node))
    for axis in (within, *axes[2:]):
        axis.normalize(_who(node))
    _channel(node, flow, channels, own)
    return [axes, *((axes[0], group) for _ in node.outputs[1:])]


def softmax(node: OpNode, flow: Flow) -> Axes:
    """``softmax`` and ``log_softmax(x, dim)``."""
    axes = flow.of(node.tensor(0))
    if axes:
        axes[node.arg(1, "dim") % len(axes)].normalize(_who(node))
    return axes


def weight_norm(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``_weight_norm(v, g, dim)``: ``g`` times the direction of ``v``, per position of ``dim``."""
    v, g = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    dim = node.arg(2, "dim", 0)
    if dim >= 0:
        flow.same(v[dim], g[dim])
    for d, axis in enumerate(v):
        if d != dim:
            axis.normalize(_who(node))
    return [v, *(g for _ in node.outputs[1:])]
