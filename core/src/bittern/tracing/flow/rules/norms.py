"""Normalisations: they keep axes and compute statistics over some of them."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = ["batch_norm", "group_norm", "layer_norm", "softmax", "weight_norm"]


def _who(node: OpNode) -> str:
    return node.module or "the model"


def _channel(node: OpNode, flow: Flow, axis: Axis, positions: range) -> None:
    for k in positions:
        if k < len(node.args) and isinstance(node.args[k], Value):
            flow.same(axis, flow.of(node.args[k])[0])
    for value in node.kwargs.values():
        if isinstance(value, Value):
            flow.same(axis, flow.of(value)[0])


def batch_norm(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``batch_norm(x, weight, bias, mean, var)``, ``instance_norm``: nothing crosses channels."""
    axes = flow.of(node.tensor(0))
    _channel(node, flow, axes[1], range(1, 5))
    return [axes, *((axes[1],) if v and len(v.shape) == 1 else None for v in node.outputs[1:])]


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
    return [axes, *(None for _ in node.outputs[1:])]


def group_norm(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``group_norm(x, groups, weight, bias)``: channels are ``groups x within``."""
    axes = flow.of(node.tensor(0))
    channels, groups = axes[1], node.args[1]
    within = channels
    if groups > 1:
        sizes = (groups, channels.size // groups)
        _, within = flow.factor(channels, sizes, flow.where(node))
    within.normalize(_who(node))
    _channel(node, flow, channels, range(2, 4))
    return [axes, *(None for _ in node.outputs[1:])]


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
    return [v, *(None for _ in node.outputs[1:])]
