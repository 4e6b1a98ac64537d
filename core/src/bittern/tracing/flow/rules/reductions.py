"""Operators that reduce dimensions, or order them."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis
from bittern.tracing.flow.graph import OpNode
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = ["cumulative", "loss", "ordered", "reduce", "renorm"]


def _reduced(node: OpNode, rank: int) -> list[int]:
    """Return the dimensions that are reduced: those that the output lost, or keeps as 1."""
    given = node.arg(_dim_position(node), "dim")
    if node.op.startswith("aten.mode.") and given is None:
        given = -1
    if given is None or given == [] or isinstance(given, bool):  # `var(x, unbiased)`
        return list(range(rank))
    every = [given] if isinstance(given, int) else list(given)
    return [d % rank for d in every] if rank else []


def _dim_position(node: OpNode) -> int:
    name = node.op.split(".")[1]
    return 2 if name in ("norm", "linalg_vector_norm", "renorm") else 1


def reduce(
    node: OpNode, flow: Flow, statistic: bool = True, positions: bool = False
) -> list[Axes | None]:
    """Sums, means, maxima: the reduced dimensions go, or stay as 1.

    Args:
        node: The node.
        flow: The pass.
        statistic: Whether removing a coordinate gives another result than making it zero.
        positions: Whether the result says where a coordinate was, as ``argmax`` does.
    """
    axes = flow.of(node.tensor(0))
    gone = _reduced(node, len(axes))
    for d in gone:
        if positions:
            axes[d].fix(f"its positions are compared ({flow.where(node)})")
        elif statistic:
            axes[d].normalize(node.module or "the model")
    kept = len(node.out.shape) == len(axes)
    out = tuple(
        Axis(1) if d in gone else axis for d, axis in enumerate(axes) if kept or d not in gone
    )
    return [out if value is not None else None for value in node.outputs]


def loss(node: OpNode, flow: Flow) -> Axes:
    """``mse_loss(x, target)`` and its kin: element by element, then their mean or sum."""
    every = [flow.of(value) for value in node.inputs()]
    shape = [max(sizes) for sizes in _columns(every)]
    axes = flow.broadcast(every, shape)
    if len(node.out.shape) == len(axes):
        return axes
    for axis in axes:
        axis.normalize(node.module or "the model")
    return ()


def _columns(every: list[Axes]) -> list[list[int]]:
    """Return the sizes that meet in each dimension, aligned at the last one."""
    rank = max(map(len, every))
    return [[a[k].size for a in every if k + len(a) >= 0] for k in range(-rank, 0)]


def renorm(node: OpNode, flow: Flow) -> Axes:
    """``renorm(x, p, dim, maxnorm)``: limits the norm of every slice along ``dim``."""
    axes = flow.of(node.tensor(0))
    for d, axis in enumerate(axes):
        if d != node.args[2] % len(axes):
            axis.normalize(node.module or "the model")
    return axes


def cumulative(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``cumsum`` and its kin: the order along the dimension counts."""
    axes = flow.of(node.tensor(0))
    if axes:
        axes[node.arg(1, "dim") % len(axes)].fix(f"its order counts ({flow.where(node)})")
    return [axes for _ in node.outputs]


def ordered(node: OpNode, flow: Flow, dim: int = 1) -> list[Axes | None]:
    """``sort``, ``topk``, ``kthvalue``, ``argsort``: the result has an order of its own."""
    axes = list(flow.of(node.tensor(0)))
    out: list[Axes | None] = []
    if not axes:
        return [() for _ in node.outputs]
    at = node.arg(dim, "dim", -1)
    at = (at if isinstance(at, int) and not isinstance(at, bool) else -1) % len(axes)
    axes[at].fix(f"its coordinates are ranked ({flow.where(node)})")
    for value in node.outputs:
        if value is None:
            out.append(None)
        elif len(value.shape) == len(axes):
            out.append((*axes[:at], Axis(value.shape[at], fixed="data"), *axes[at + 1 :]))
        else:
            out.append((*axes[:at], *axes[at + 1 :]))
    return out
