"""Reading sizes, taking parts, and reducing: what does not touch a width lets it pass."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

from bittern.tracing.symbolic.dependencies import Step
from bittern.tracing.symbolic.names import TableProcessor, operations
from bittern.tracing.symbolic.values import Axis, Dim, Extent, Pieces, Shape, Sizes, Token, axes_of

__all__ = ["indexing"]

_SUMS = ("mean", "sum", "prod", "var", "std", "logsumexp", "nanmean", "nansum", "norm")
_REDUCTIONS = operations([*_SUMS, "amax", "amin", "any", "all", "count_nonzero"])
_PLAIN_ATTRIBUTES = frozenset(
    ["dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_sparse", "training"]
)
_PLAIN_METHODS = ("dim", "ndimension", "is_floating_point", "get_device", "numel", "nelement")
_ALL = slice(None)


def _attribute(step: Step) -> Any:
    value, name = step.args[0], step.args[1]
    if isinstance(value, Shape):
        if name == "shape":
            return _sizes(step, value)
        if name in _PLAIN_ATTRIBUTES:
            return None
        if name in ("data", "real"):
            return value
    return step.boundary(f"reads `{name}`")


def _sizes(step: Step, shape: Shape) -> Any:
    """All sizes; unpacking them tells the number of dimensions."""
    rank = step.walk.collection.unpacked(step.node)
    if rank is None or shape.rank is not None or shape.loose:
        return Sizes(shape)
    dims = {position % rank: dim for position, dim in shape.dims.items() if position < rank}
    known = Shape(shape.source, rank, dims, shape.origin)
    argument = step.node.args[0]
    if isinstance(argument, fx.Node):
        step.walk.values[argument] = known
    return Sizes(known)


def _size(step: Step) -> Any:
    shape, dim = step.first, step.argument(1, "dim")
    if not isinstance(shape, Shape):
        return step.boundary()
    return _sizes(step, shape) if dim is None else _extent(step, shape, dim)


def _extent(step: Step, shape: Shape, dim: Any) -> Any:
    if not isinstance(dim, int) or shape.loose:
        return step.boundary("reads the width")
    # Whether this names a width depends on the number of dimensions, which is not known, unless
    # both count from the same end; the first is the batch.
    elsewhere = [p for p, _ in shape.axes if (p < 0) != (dim < 0)]
    if shape.rank is None and dim not in shape.dims and elsewhere and dim != 0:
        return step.boundary("reads a size that may be the width")
    return Extent(shape.at(dim))


def _plain(step: Step) -> Any:
    """A fact about a tensor that is no size of a width; `numel` is the product of all."""
    if step.node.target in ("numel", "nelement"):
        return step.boundary("reads the width")
    return None


def _get_item(step: Step) -> Any:
    value, index = step.args[0], step.args[1]
    if isinstance(value, Sizes):
        return _part_of_sizes(step, value.shape, index)
    if isinstance(value, Pieces):
        return value.piece if isinstance(index, int) else value
    if isinstance(value, tuple | list) and isinstance(index, int | slice):
        try:
            return value[index]
        except (IndexError, TypeError):
            return step.boundary()
    if isinstance(value, Shape):
        return _part(step, value, index if isinstance(index, tuple) else (index,))
    return step.boundary() if axes_of(value) else None


def _part_of_sizes(step: Step, shape: Shape, index: Any) -> Any:
    if isinstance(index, int):
        return _extent(step, shape, index)
    if not isinstance(index, slice):
        return step.boundary("reads the width")
    if shape.rank is not None:
        try:
            return tuple(Extent(dim) for dim in shape.every()[index])
        except TypeError:
            return step.boundary("reads the width")
    if shape.loose or any(_in_slice(index, position) for position, _ in shape.axes):
        return step.boundary("reads sizes among which the width may be")
    return None


def _in_slice(part: slice, position: int) -> bool:
    """Return whether a slice may contain a position, the number of dimensions not being known."""
    start, stop = part.start, part.stop
    if not (isinstance(start, int | None) and isinstance(stop, int | None)):
        return True
    if stop is not None and (stop >= 0) == (position >= 0) and position >= stop:
        return False
    return not (start is not None and (start >= 0) == (position >= 0) and position < start)


def _part(step: Step, shape: Shape, index: tuple[Any, ...]) -> Any:
    """``x[:, 0, ..., None]``: whole dimensions pass, a part of a width does not."""
    if axes_of(list(index)):
        return step.boundary("picks by another tensor")
    if shape.loose:
        return shape
    if not shape.axes:
        return Shape(step.node.name, origin=f"what {step.where} returns")
    used = [item for item in index if item is not None and item is not Ellipsis]
    if (
        shape.rank is None
        or any(isinstance(i, bool) for i in used)
        or any(not isinstance(i, int | slice) for i in used)
    ):
        untouched = shape.rank is None and all(p < 0 for p, _ in shape.axes)
        if untouched and index and index[0] is Ellipsis and index[-1] == _ALL and len(index) == 2:
            return shape
        return step.boundary("takes a part of a tensor of an unknown number of dimensions")
    if index.count(Ellipsis) > 1:
        return step.boundary()
    fill = shape.rank - len(used)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    full = [*index[:at], *[_ALL] * fill, *index[at + 1 :]]
    dims: list[Dim] = []
    position = 0
    for item in full:
        if item is None:
            dims.append(1)
            continue
        dim = shape.at(position)
        if item == _ALL:
            dims.append(dim)
        elif isinstance(dim, Axis):
            return step.boundary("takes a part of the width")
        elif isinstance(item, slice):
            dims.append(Token(step.node.name, position))
        position += 1
    return shape.but(step.node.name, dict(enumerate(dims)), rank=len(dims))


def _split(step: Step) -> Any:
    """``chunk`` and ``split`` along another dimension: every piece has the width."""
    shape, dim = step.first, step.argument(2, "dim", 0)
    if not isinstance(shape, Shape) or not isinstance(dim, int) or shape.loose:
        return step.boundary()
    position = shape.index(dim)
    along = shape.dims.get(position)
    unsure = shape.rank is None and any((p < 0) != (position < 0) for p, _ in shape.axes)
    if isinstance(along, Axis) or unsure:
        return step.boundary("takes parts of the width")
    dims = {**shape.dims, position: Token(step.node.name, position)}
    return Pieces(shape.but(step.node.name, dims))


def _reduce(step: Step) -> Any:
    """Dimensions that are no widths can be summed over."""
    shape = step.first
    if not isinstance(shape, Shape) or shape.loose:
        return step.boundary()
    dim = step.argument(2 if step.target in _NORMS else 1, "dim")
    keep = step.argument(3 if step.target in _NORMS else 2, "keepdim", False)
    if step.target in _SPREADS and len(step.args) > 2:
        return step.boundary("is called in a deprecated way")
    reduced = (dim,) if isinstance(dim, int) else dim
    if not shape.axes:
        return Shape(step.node.name, origin=f"what {step.where} returns")
    if not isinstance(reduced, tuple | list) or not all(isinstance(d, int) for d in reduced):
        return step.boundary("reduces over the width")
    return _without(step, shape, reduced, keep=bool(keep))


_NORMS = operations(["norm"])
_SPREADS = operations(["std", "var"])


def _without(step: Step, shape: Shape, reduced: Iterable[int], *, keep: bool) -> Any:
    positions = {shape.index(dim) for dim in reduced}
    if any(isinstance(shape.dims.get(position), Axis) for position in positions):
        return step.boundary("reduces over the width")
    if shape.rank is None:
        if not all((q < 0) == (p < 0) for q in positions for p, _ in shape.axes):
            return step.boundary("reduces over what may be the width")
        if keep:
            return shape.but(step.node.name, {**shape.dims, **dict.fromkeys(positions, 1)})
        if not all(p < 0 for p in (*positions, *shape.dims)):
            return step.boundary("reduces a tensor of an unknown number of dimensions")
        # Counted from the end, what is in front moves up.
        moved = {p + sum(q > p for q in positions): d for p, d in shape.dims.items()}
        return shape.but(step.node.name, moved)
    if keep:
        dims = {p: 1 if p in positions else shape.at(p) for p in range(shape.rank)}
        return shape.but(step.node.name, dims)
    left = [shape.at(p) for p in range(shape.rank) if p not in positions]
    return shape.but(step.node.name, dict(enumerate(left)), rank=len(left))


def indexing() -> TableProcessor:
    """Return the processor for sizes, parts and reductions."""
    return TableProcessor.of(
        ({getattr}, _attribute),
        ({"size"}, _size),
        (operations(_PLAIN_METHODS), _plain),
        ({operator.getitem}, _get_item),
        (operations(["chunk", "split"]), _split),
        (_REDUCTIONS, _reduce),
    )
