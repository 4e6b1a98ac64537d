"""View, flatten, permute and their like: where does a width go?

Sizes are mostly unknown, so a view is followed only where its arguments say which dimension goes
where: sizes read from the tensor itself, ones, and a single ``-1``. Channels that are flattened
with what comes after them (or before) keep their structure; how many positions each takes is
settled by the layer that reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bittern.tracing.symbolic.dependencies import Step
from bittern.tracing.symbolic.names import TableProcessor, module_types, operations
from bittern.tracing.symbolic.symbols import Layout
from bittern.tracing.symbolic.values import Axis, Dim, Extent, Shape, Sizes, Token, axes_of

__all__ = ["reshape"]


class _UnclearError(Exception):
    """A reshape cannot be followed; says why."""


def merge(step: Step, dims: Sequence[Dim], position: int) -> Dim:
    """Return the dimension that consecutive ones are flattened into."""
    kept = [dim for dim in dims if dim != 1]
    at = [i for i, dim in enumerate(kept) if isinstance(dim, Axis)]
    if not at:
        if len(kept) == 1:
            return kept[0]
        return _product(kept) or Token(step.node.name, position)
    if len(at) > 1:
        raise _UnclearError("flattens two widths into one dimension")
    axis = kept[at[0]]
    assert isinstance(axis, Axis)
    before, after = kept[: at[0]], kept[at[0] + 1 :]
    if not before and not after:
        return axis
    if axis.layout is not None or (before and after):
        raise _UnclearError("flattens the width together with dimensions on both sides")
    return Axis(axis.parts, Layout("inner" if after else "outer", _product(before or after)))


def _product(dims: Sequence[Dim]) -> int:
    """Return the product of known sizes, 0 if one is not known."""
    product = 1
    for dim in dims:
        product *= dim if isinstance(dim, int) else 0
    return product


def _flatten(step: Step) -> Any:
    if step.node.op == "call_module":
        start, end = step.target.start_dim, step.target.end_dim
    else:
        start, end = step.argument(1, "start_dim", 0), step.argument(2, "end_dim", -1)
    shape = step.first
    if not isinstance(shape, Shape) or not shape.axes:
        return step.boundary()
    if shape.rank is None:
        return step.boundary("flattens a tensor of an unknown number of dimensions")
    start, end = shape.index(start), shape.index(end)
    dims = shape.every()
    try:
        merged = merge(step, dims[start : end + 1], start)
    except _UnclearError as unclear:
        return step.boundary(str(unclear))
    new = [*dims[:start], merged, *dims[end + 1 :]]
    return shape.but(step.node.name, dict(enumerate(new)), rank=len(new))


def _view(step: Step) -> Any:
    shape = step.first
    wanted: Any = step.args[1:] or next(iter(step.kwargs.values()), ())
    if len(wanted) == 1 and isinstance(wanted[0], tuple | list | Sizes):
        wanted = wanted[0]
    if isinstance(wanted, Sizes) and wanted.shape.rank is not None:
        wanted = [Extent(dim) for dim in wanted.shape.every()]
    if not isinstance(shape, Shape) or not isinstance(wanted, tuple | list):
        return step.boundary()
    if not shape.axes and not axes_of(list(wanted)):
        return _unknown_view(step, shape, wanted)
    if shape.rank is None or shape.loose:
        return step.boundary("reshapes a tensor of an unknown number of dimensions")
    try:
        dims = _follow_view(step, shape.every(), list(wanted))
    except _UnclearError as unclear:
        return step.boundary(str(unclear))
    return shape.but(step.node.name, dict(enumerate(dims)), rank=len(dims))


def _unknown_view(step: Step, shape: Shape, wanted: Sequence[Any]) -> Shape:
    """A view of a tensor without widths: its sizes are the ones asked for."""
    dims: dict[int, Dim] = {}
    for position, size in enumerate(wanted):
        if isinstance(size, Extent):
            dims[position] = size.dim
        elif isinstance(size, int) and size >= 0:
            dims[position] = size
    return Shape(step.node.name, len(wanted), dims, f"what {step.where} returns")


def _follow_view(step: Step, dims: list[Dim], wanted: list[Any]) -> list[Dim]:
    free = [i for i, size in enumerate(wanted) if isinstance(size, int) and size == -1]
    if len(free) > 1:
        raise _UnclearError("reshapes in a way that is not understood")
    cut = free[0] if free else len(wanted)
    front = _consume(step, dims, wanted[:cut])
    if not free:
        if any(dim != 1 for dim in dims):
            raise _UnclearError("reshapes to sizes that do not say where the width goes")
        return front
    dims.reverse()
    back = _consume(step, dims, wanted[:cut:-1])
    dims.reverse()
    return [*front, merge(step, dims, cut), *reversed(back)]


def _consume(step: Step, dims: list[Dim], wanted: Sequence[Any]) -> list[Dim]:
    """Take the dimensions of these sizes off the front of ``dims``."""
    found: list[Dim] = []
    for size in wanted:
        target = size.dim if isinstance(size, Extent) else size
        if target == 1 and not (dims and dims[0] == 1):
            found.append(1)
            continue
        while dims and dims[0] == 1 and target != 1:
            dims.pop(0)
        if not dims:
            raise _UnclearError("reshapes to sizes that do not say where the width goes")
        dim = dims.pop(0)
        if isinstance(dim, Axis) and isinstance(target, Axis):
            # The view works for equal widths only.
            if dim.layout is None and target.layout is None:
                step.join([dim, target])
            elif not dim.same(target):
                raise _UnclearError("reshapes flattened channels")
        elif isinstance(dim, Axis):
            raise _UnclearError(
                f"fixes the width to {target}"
                if isinstance(target, int)
                else "splits or merges the width by a size that is not known"
            )
        elif dim != target:
            raise _UnclearError("reshapes to sizes that do not say where the width goes")
        found.append(dim)
    return found


def _permute(step: Step) -> Any:
    order: Any = step.args[1:] or next(iter(step.kwargs.values()), ())
    if len(order) == 1 and isinstance(order[0], tuple | list):
        order = order[0]
    shape = step.first
    if not isinstance(shape, Shape) or not all(isinstance(dim, int) for dim in order):
        return step.boundary()
    if shape.rank is None and all(p < 0 for p in shape.dims):
        shape = _ranked(shape, len(order))
    if shape.rank != len(order) or shape.loose:
        return step.boundary()
    dims = [shape.at(dim) for dim in order]
    return shape.but(step.node.name, dict(enumerate(dims)))


def _ranked(shape: Shape, rank: int) -> Shape:
    dims = {position % rank: dim for position, dim in shape.dims.items()}
    return Shape(shape.source, rank, dims, shape.origin)


def _transpose(step: Step) -> Any:
    shape = step.first
    one, other = step.argument(1, "dim0"), step.argument(2, "dim1")
    if not isinstance(shape, Shape) or not isinstance(one, int) or not isinstance(other, int):
        return step.boundary()
    one, other = shape.index(one), shape.index(other)
    signs = {position < 0 for position in (one, other, *shape.dims)}
    if shape.loose or (shape.rank is None and len(signs) > 1 and shape.axes):
        return step.boundary("swaps dimensions of a tensor of which it is not known how many")
    dims = {**shape.dims, one: shape.at(other), other: shape.at(one)}
    return shape.but(step.node.name, dims)


def _unsqueeze(step: Step) -> Any:
    shape, dim = step.first, step.argument(1, "dim")
    if not isinstance(shape, Shape) or not isinstance(dim, int):
        return step.boundary()
    if shape.rank is None or shape.loose:
        if dim == 0 and all(position < 0 for position in shape.dims):
            return shape
        return step.boundary("adds a dimension to an unknown number of them")
    dims = shape.every()
    dims.insert(dim % (shape.rank + 1), 1)
    return shape.but(step.node.name, dict(enumerate(dims)), rank=len(dims))


def _squeeze(step: Step) -> Any:
    shape, dim = step.first, step.argument(1, "dim")
    if not isinstance(shape, Shape) or shape.rank is None or shape.loose:
        return step.boundary("drops a dimension of an unknown number of them")
    wanted = [dim] if isinstance(dim, int) else dim
    chosen = range(shape.rank) if wanted is None else [shape.index(d) for d in wanted]
    dims = shape.every()
    for position in chosen:
        if isinstance(dims[position], Token) or (
            isinstance(dims[position], Axis) and wanted is not None
        ):
            return step.boundary("drops a dimension if its size is 1, which is not known")
    left = [d for p, d in enumerate(dims) if p not in chosen or d != 1]
    return shape.but(step.node.name, dict(enumerate(left)), rank=len(left))


def _expand(step: Step) -> Any:
    """Only dimensions of size 1 grow; ``-1`` leaves one alone."""
    shape = step.first
    wanted: Any = step.args[1:] or next(iter(step.kwargs.values()), ())
    if len(wanted) == 1 and isinstance(wanted[0], tuple | list):
        wanted = wanted[0]
    if not isinstance(shape, Shape) or shape.rank is None or len(wanted) != shape.rank:
        return step.boundary()
    dims = shape.every()
    for position, size in enumerate(wanted):
        dim = dims[position]
        target = size.dim if isinstance(size, Extent) else size
        if target in (-1, dim) or (isinstance(dim, Axis) and dim.same(target)):
            continue
        if isinstance(dim, Axis) or isinstance(target, Axis):
            return step.boundary("fixes the width")
        dims[position] = Token(step.node.name, position)
    return shape.but(step.node.name, dict(enumerate(dims)))


def reshape() -> TableProcessor:
    """Return the processor for views and permutations."""
    return TableProcessor.of(
        (operations(["flatten"]) | module_types(["Flatten"]), _flatten),
        (operations(["view", "reshape"]), _view),
        (operations(["permute"]), _permute),
        (operations(["transpose", "swapaxes", "swapdims"]), _transpose),
        (operations(["unsqueeze"]), _unsqueeze),
        (operations(["squeeze"]), _squeeze),
        (operations(["expand"]), _expand),
    )
