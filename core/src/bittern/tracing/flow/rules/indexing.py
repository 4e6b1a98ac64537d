"""Operators that look up, gather and scatter by index."""

from __future__ import annotations

from collections.abc import Iterable

from bittern.tracing.flow.axes import Axis
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = [
    "embedding",
    "embedding_bag",
    "embedding_renorm",
    "gather",
    "index",
    "index_along",
    "index_put",
    "index_select",
    "scatter",
]


def _chosen(axis: Axis, node: OpNode, flow: Flow) -> None:
    axis.fix(f"it is looked up by an index ({flow.where(node)})")


def _placed(axes: Iterable[Axis], node: OpNode, flow: Flow) -> None:
    for axis in axes:
        axis.fix(f"it is placed by an index ({flow.where(node)})")


def embedding(node: OpNode, flow: Flow) -> Axes:
    """``embedding(weight, ids)``: ``weight`` is ``(entries, features)``."""
    entries, features = flow.of(node.tensor(0))
    _chosen(entries, node, flow)
    return (*flow.of(node.tensor(1)), features)


def embedding_renorm(node: OpNode, flow: Flow) -> Axes:
    """``embedding_renorm_(weight, ids, norm, p)``: limits the norm of the entries that are read."""
    entries, features = flow.of(node.tensor(0))
    _chosen(entries, node, flow)
    _placed(flow.of(node.tensor(1)), node, flow)
    features.normalize(node.module or "the model")
    return (entries, features)


def embedding_bag(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``embedding_bag(weight, ids, offsets, ...)``: the sum or mean of some entries."""
    entries, features = flow.of(node.tensor(0))
    _chosen(entries, node, flow)
    for value in list(node.inputs())[1:]:  # ids, offsets, weights per sample
        _placed(flow.of(value), node, flow)
    bags = Axis(node.out.shape[0], fixed="data")
    return [(bags, features), *(None for _ in node.outputs[1:])]


def index_select(node: OpNode, flow: Flow) -> Axes:
    """``index_select(x, dim, ids)``."""
    axes = list(flow.of(node.tensor(0)))
    if not axes:
        return tuple(Axis(n) for n in node.out.shape)
    dim = node.arg(1, "dim") % len(axes)
    _chosen(axes[dim], node, flow)
    ids = flow.of(node.tensor(2))
    axes[dim] = ids[0] if ids else Axis(1)
    return tuple(axes)


def index(node: OpNode, flow: Flow) -> Axes:
    """``x[ids]`` with tensors of indices or a mask; ``None`` keeps a dimension."""
    axes = flow.of(node.tensor(0))
    kept, made, first = _advanced(axes, node.args[1], node, flow)
    if first is None:
        return (*made, *kept)
    return (*kept[:first], *made, *kept[first:])


def _advanced(
    axes: Axes, indices: list[Value | None], node: OpNode, flow: Flow
) -> tuple[list[Axis], Axes, int | None]:
    """Return what stays, what the indices make, and where it goes (``None``: to the front)."""
    kept: list[Axis] = []
    every: list[Axes] = []
    places: list[int] = []
    d = 0
    for k, item in enumerate(indices):
        if item is None:
            kept.append(axes[d])
            d += 1
            continue
        places.append(k)
        mask = item.boolean
        width = len(item.shape) if mask else 1
        for axis in axes[d : d + width]:
            _chosen(axis, node, flow)
        if mask:
            for axis in flow.of(item):
                axis.fix(f"it is a mask ({flow.where(node)})")
        every.append(() if mask else flow.of(item))
        d += width
    kept.extend(axes[d:])
    adjacent = places == list(range(places[0], places[-1] + 1)) if places else True
    first = places[0] if adjacent and places else None
    shape = _made_shape(node, kept, first)
    known = [a for a in every if a]
    fits = known and all(len(a) <= len(shape) for a in known) and len(known) == len(every)
    if fits:
        return kept, flow.broadcast(known, shape), first
    for own in known:
        _placed(own, node, flow)
    return kept, tuple(Axis(n, fixed="data") for n in shape), first


def _made_shape(node: OpNode, kept: list[Axis], first: int | None) -> tuple[int, ...]:
    if node.op.split(".")[1].startswith("index_put"):
        return ()
    shape = node.out.shape
    count = len(shape) - len(kept)
    at = first or 0
    return shape[at : at + count]


def index_put(node: OpNode, flow: Flow) -> Axes:
    """``x[ids] = values``."""
    axes = flow.of(node.tensor(0))
    kept, _, first = _advanced(axes, node.args[1], node, flow)
    for item in node.args[1]:
        if item is not None:
            _placed(flow.of(item), node, flow)
    at = first or 0
    ranks = [1 if v.boolean else len(v.shape) for v in node.args[1] if v is not None]
    places: list[Axis | None] = [*kept[:at], *[None] * max(ranks), *kept[at:]]
    for axis, value in zip(reversed(places), reversed(flow.of(node.tensor(2))), strict=False):
        if axis is None:
            _placed((value,), node, flow)
        elif value.size != 1:
            flow.same(axis, value)
    return axes


def gather(node: OpNode, flow: Flow) -> Axes:
    """``gather(x, dim, ids)``: along ``dim`` by index, the other dimensions by position."""
    axes, ids = flow.of(node.tensor(0)), flow.of(node.tensor(2))
    if not axes or len(axes) != len(ids):  # single elements, or none
        _placed(axes, node, flow)
        return ids
    dim = node.arg(1, "dim") % len(axes)
    _chosen(axes[dim], node, flow)
    _beside(axes, ids, dim, node, flow)
    return ids


def scatter(node: OpNode, flow: Flow) -> Axes:
    """``scatter(x, dim, ids, src)`` and its kin."""
    axes, ids = flow.of(node.tensor(0)), flow.of(node.tensor(2))
    if not axes or len(axes) != len(ids):  # single elements, or none
        _placed(axes, node, flow)
        return axes
    dim = node.arg(1, "dim") % len(axes)
    _chosen(axes[dim], node, flow)
    _placed((ids[dim],), node, flow)
    _beside(axes, ids, dim, node, flow)
    source = node.arg(3, "src")
    if isinstance(source, Value) and source.shape:
        given = flow.of(source)
        _placed((given[dim],), node, flow)
        _beside(axes, given, dim, node, flow)
    return axes


def _beside(axes: Axes, other: Axes, dim: int, node: OpNode, flow: Flow) -> None:
    for d, (one, two) in enumerate(zip(axes, other, strict=True)):
        if d == dim:
            continue
        if one.size == two.size:
            flow.same(one, two)
        else:
            for axis in (one, two):
                axis.fix(f"only a part of it is indexed ({flow.where(node)})")


def index_along(node: OpNode, flow: Flow) -> Axes:
    """``index_add``, ``index_copy``, ``index_reduce``, ``index_fill(x, dim, ids, src)``."""
    axes = flow.of(node.tensor(0))
    if not axes:
        return axes
    dim = node.arg(1, "dim") % len(axes)
    _chosen(axes[dim], node, flow)
    _placed(flow.of(node.tensor(2)), node, flow)
    source = node.arg(3, "source")
    if isinstance(source, Value) and source.shape:
        given = flow.of(source)
        _placed((given[dim],), node, flow)
        _beside(axes, given, dim, node, flow)
    return axes
