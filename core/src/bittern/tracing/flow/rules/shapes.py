"""Operators that move, split and join dimensions."""

from __future__ import annotations

from typing import Any

from bittern.tracing.flow.axes import Axis, product, total
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = [
    "block_diag",
    "cat",
    "diag_embed",
    "diagonal",
    "diagonal_scatter",
    "expand",
    "flip",
    "movedim",
    "pad",
    "permute",
    "repeat",
    "repeat_interleave",
    "reshape",
    "select",
    "select_scatter",
    "slice_",
    "slice_scatter",
    "split",
    "squeeze",
    "stack",
    "transpose",
    "triangle",
    "unbind",
    "unfold",
    "unfold_backward",
    "unsqueeze",
    "view_dtype",
]


def _dims(given: Any, rank: int) -> list[int]:
    every = [given] if isinstance(given, int) else list(given)
    return [d % rank for d in every] if rank else []


def reshape(node: OpNode, flow: Flow) -> Axes:
    """``view``, ``reshape``, ``flatten`` and ``unflatten``: the same elements in another shape."""
    return flow.reshape(flow.of(node.tensor(0)), node.out.shape, flow.where(node))


def view_dtype(node: OpNode, flow: Flow) -> Axes:
    """``view(x, dtype)``: the same bytes, the last dimension in elements of another size."""
    axes = flow.of(node.tensor(0))
    if not axes or axes[-1].size == node.out.shape[-1]:
        return axes
    axes[-1].fix(f"its bytes are taken apart ({flow.where(node)})")
    return (*axes[:-1], Axis(node.out.shape[-1], fixed="data"))


def permute(node: OpNode, flow: Flow) -> Axes:
    """``permute(x, dims)``."""
    axes = flow.of(node.tensor(0))
    return tuple(axes[d] for d in _dims(node.arg(1, "dims"), len(axes)))


def transpose(node: OpNode, flow: Flow) -> Axes:
    """``transpose(x, a, b)`` and ``t(x)``."""
    axes = list(flow.of(node.tensor(0)))
    if len(axes) < 2:
        return tuple(axes)
    default = (0, 1) if node.op.split(".")[1].startswith("t") else (-2, -1)
    a, b = node.arg(1, "dim0", default[0]), node.arg(2, "dim1", default[1])
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def movedim(node: OpNode, flow: Flow) -> Axes:
    """``movedim(x, source, destination)``."""
    axes = flow.of(node.tensor(0))
    rank = len(axes)
    source, target = _dims(node.args[1], rank), _dims(node.args[2], rank)
    order: list[int | None] = [None] * rank
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter([d for d in range(rank) if d not in source])
    return tuple(axes[next(rest) if d is None else d] for d in order)


def unsqueeze(node: OpNode, flow: Flow) -> Axes:
    """``unsqueeze(x, dim)``."""
    axes = list(flow.of(node.tensor(0)))
    axes.insert(node.arg(1, "dim") % (len(axes) + 1), Axis(1))
    return tuple(axes)


def squeeze(node: OpNode, flow: Flow) -> Axes:
    """``squeeze(x, dim)``."""
    axes = flow.of(node.tensor(0))
    given = node.arg(1, "dim")
    gone = range(len(axes)) if given is None else _dims(given, len(axes))
    return tuple(a for d, a in enumerate(axes) if d not in gone or a.size != 1)


def expand(node: OpNode, flow: Flow) -> Axes:
    """``expand(x, sizes)``: along what it repeats, all coordinates are alike."""
    axes, shape = flow.of(node.tensor(0)), node.out.shape
    extra = len(shape) - len(axes)
    return tuple(
        Axis(n) if d < extra or axes[d - extra].size != n else axes[d - extra]
        for d, n in enumerate(shape)
    )


def repeat(node: OpNode, flow: Flow) -> Axes:
    """``repeat(x, repeats)`` and ``tile``."""
    axes, shape = flow.of(node.tensor(0)), node.out.shape
    padded = [Axis(1)] * (len(shape) - len(axes)) + list(axes)
    return tuple(
        a if a.size == n else product((Axis(n // a.size), a)) if a.size else Axis(n)
        for a, n in zip(padded, shape, strict=True)
    )


def repeat_interleave(node: OpNode, flow: Flow) -> Axes:
    """``repeat_interleave(x, n, dim)``: every coordinate ``n`` times in a row."""
    axes, shape = list(flow.of(node.tensor(0))), node.out.shape
    repeats, dim = node.arg(1, "repeats"), node.arg(2, "dim")
    if repeats is None:  # of the first argument, which says how often its positions are repeated
        axes[0].fix(f"its positions become numbers ({flow.where(node)})")
        return (Axis(shape[0], fixed="data"),)
    if dim is None:
        axes, dim = [product(axes)], 0
    if isinstance(repeats, Value):
        for axis in flow.of(repeats):
            axis.fix(f"it says how often coordinates are repeated ({flow.where(node)})")
        axes[dim].fix(f"its coordinates are repeated unequally ({flow.where(node)})")
        axes[dim] = Axis(shape[dim], fixed="data")
    else:
        axes[dim] = product((axes[dim], Axis(repeats)))
    return tuple(axes)


def cat(node: OpNode, flow: Flow) -> Axes:
    """``cat(tensors, dim)``."""
    tensors = [v for v in node.args[0] if v.shape != (0,) or len(node.out.shape) == 1]
    every = [flow.of(v) for v in tensors]
    dim = node.arg(1, "dim", 0) % len(node.out.shape)
    out: list[Axis] = []
    for d in range(len(node.out.shape)):
        if d == dim:
            out.append(total(axes[d] for axes in every))
        else:
            flow.together([(axes[d],) for axes in every])
            out.append(every[0][d])
    return tuple(out)


def stack(node: OpNode, flow: Flow) -> Axes:
    """``stack(tensors, dim)``: a new dimension whose positions mean something."""
    every = [flow.of(v) for v in node.args[0]]
    flow.together(every)
    axes = list(every[0])
    dim = node.arg(1, "dim", 0) % len(node.out.shape)
    axes.insert(dim, Axis(len(every), fixed=f"tensors are stacked along it ({flow.where(node)})"))
    return tuple(axes)


def split(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``split``, ``split_with_sizes``, ``chunk`` and ``tensor_split``: consecutive parts."""
    axes = flow.of(node.tensor(0))
    dim = node.arg(2, "dim", 0) % len(axes)
    if isinstance(node.args[1], Value):
        for axis in flow.of(node.args[1]):
            axis.fix(f"it says where another one is cut ({flow.where(node)})")
    outs = [v for v in node.outputs if v is not None]
    parts = flow.divide(axes[dim], [v.shape[dim] for v in outs], flow.where(node))
    return [(*axes[:dim], part, *axes[dim + 1 :]) for part in parts]


def unbind(node: OpNode, flow: Flow) -> list[Axes | None]:
    """``unbind(x, dim)``: every position becomes a tensor of its own."""
    axes = flow.of(node.tensor(0))
    dim = node.arg(1, "dim", 0) % len(axes)
    axes[dim].fix(f"its positions go separate ways ({flow.where(node)})")
    return [(*axes[:dim], *axes[dim + 1 :]) for _ in node.outputs]


def select(node: OpNode, flow: Flow) -> Axes:
    """``select(x, dim, index)``: one position."""
    axes = flow.of(node.tensor(0))
    dim = node.arg(1, "dim") % len(axes)
    axes[dim].fix(f"one position is picked out ({flow.where(node)})")
    return (*axes[:dim], *axes[dim + 1 :])


def slice_(node: OpNode, flow: Flow) -> Axes:
    """``slice(x, dim, start, end, step)`` and ``narrow(x, dim, start, length)``.

    A literal position counts from the front: what lies before it cannot be removed without moving
    it. Halves that turn out to be one axis (rotary embeddings) can shrink together; who collects
    the groups looks at that (`Axis.cut`).
    """
    axes = flow.of(node.tensor(0))
    dim = node.arg(1, "dim", 0) % len(axes)
    start, end, step = node.arg(2, "start"), node.arg(3, "end"), node.arg(4, "step", 1)
    where = flow.where(node)
    if node.op.startswith("aten.narrow"):
        if isinstance(start, Value):
            for axis in (axes[dim], *flow.of(start)):
                axis.fix(f"a part of it is picked by an index ({where})")
            return (*axes[:dim], Axis(end, fixed="data"), *axes[dim + 1 :])
        start = start + axes[dim].size if start < 0 else start
        end, step = start + end, 1
    return _sliced(axes, dim, (start, end, step), flow, where)


def _sliced(axes: Axes, dim: int, span: tuple[Any, ...], flow: Flow, where: str) -> Axes:
    """Return the axes of ``x[start:end:step]`` along ``dim``."""
    start, end, step = span
    axis = axes[dim]
    size = axis.size
    first = min(max(start + size if (start or 0) < 0 else (start or 0), 0), size)
    last = size if end is None else min(max(end + size if end < 0 else end, first), size)
    if (first, last, step) == (0, size, 1):
        return axes
    if step != 1:
        part = _stride(axis, (first, last, step), flow, where)
        return (*axes[:dim], part, *axes[dim + 1 :])
    _, part, _ = flow.divide(axis, (first, last - first, size - last), where)
    for position, given in ((first, start), (last, end)):
        if 0 < position < size and given is not None:
            axis.cut(-(size - position) if given < 0 else position, where)
    return (*axes[:dim], part, *axes[dim + 1 :])


def _stride(axis: Axis, span: tuple[int, int, int], flow: Flow, where: str) -> Axis:
    """Every ``step``-th coordinate: the outer factor of an axis that is a multiple of it."""
    first, last, step = span
    size = axis.size
    if size % step == 0 and first < step and last > size - step + first:
        outer, inner = flow.factor(axis, (size // step, step), where)
        inner.fix(f"every {step}th coordinate is taken ({where})")
        return outer
    axis.fix(f"every {step}th coordinate is taken ({where})")
    return Axis(-(-(last - first) // step), fixed="data")


def flip(node: OpNode, flow: Flow) -> Axes:
    """``flip`` and ``roll``: coordinates change places."""
    axes = flow.of(node.tensor(0))
    given = node.arg(1, "dims") if "flip" in node.op else node.arg(2, "dims", ())
    for d in _dims(given, len(axes)) or range(len(axes)):
        axes[d].fix(f"its coordinates change places ({flow.where(node)})")
    return axes


def slice_scatter(node: OpNode, flow: Flow) -> Axes:
    """``slice_scatter(x, source, dim, start, end, step)``: as writing the source into a slice."""
    axes, source = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    dim = node.arg(2, "dim", 0) % len(axes)
    span = tuple(node.arg(k, "", default) for k, default in ((3, None), (4, None), (5, 1)))
    flow.together([_sliced(axes, dim, span, flow, flow.where(node)), source])
    return axes


def select_scatter(node: OpNode, flow: Flow) -> Axes:
    """``select_scatter(x, source, dim, index)``: as writing the source into one position."""
    axes = flow.of(node.tensor(0))
    dim = node.arg(2, "dim") % len(axes)
    axes[dim].fix(f"one position is picked out ({flow.where(node)})")
    flow.together([(*axes[:dim], *axes[dim + 1 :]), flow.of(node.tensor(1))])
    return axes


def triangle(node: OpNode, flow: Flow) -> Axes:
    """``tril`` and ``triu``: the last two dimensions are positions."""
    axes = flow.of(node.tensor(0))
    for axis in axes[-2:]:
        axis.fix(f"its positions are compared ({flow.where(node)})")
    return axes


def diagonal(node: OpNode, flow: Flow) -> Axes:
    """``diagonal(x, offset, a, b)``: two dimensions become one of positions."""
    axes = list(flow.of(node.tensor(0)))
    a, b = (node.arg(k, n, v) % len(axes) for k, n, v in ((2, "dim1", 0), (3, "dim2", 1)))
    for d in (a, b):
        axes[d].fix(f"its positions are compared ({flow.where(node)})")
    rest = [axis for d, axis in enumerate(axes) if d not in (a, b)]
    return (*rest, Axis(node.out.shape[-1], fixed="data"))


def diagonal_scatter(node: OpNode, flow: Flow) -> Axes:
    """``diagonal_scatter(x, source, offset, a, b)``: as writing the source into the diagonal."""
    axes, source = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    dims = [node.arg(k, "", default) % len(axes) for k, default in ((3, 0), (4, 1))]
    for axis in (source[-1], *(axes[d] for d in dims)):
        axis.fix(f"its positions are compared ({flow.where(node)})")
    rest = tuple(axis for d, axis in enumerate(axes) if d not in dims)
    flow.together([rest, source[:-1]])
    return axes


def diag_embed(node: OpNode, flow: Flow) -> Axes:
    """``diag_embed(x, offset, a, b)``: the last dimension becomes the diagonal of two."""
    *axes, last = flow.of(node.tensor(0))
    last.fix(f"its positions are compared ({flow.where(node)})")
    rank = len(node.out.shape)
    places = sorted(node.arg(k, "", default) % rank for k, default in ((2, -2), (3, -1)))
    for d in places:
        axes.insert(d, Axis(node.out.shape[d], fixed="data"))
    return tuple(axes)


def block_diag(node: OpNode, flow: Flow) -> Axes:
    """``block_diag(tensors)``: rows after rows, columns after columns; vectors are rows."""
    every = [flow.of(value) for value in node.args[0]]
    whole = [(*(Axis(1) for _ in range(2 - len(axes))), *axes) for axes in every]
    return total(rows for rows, _ in whole), total(columns for _, columns in whole)


def pad(node: OpNode, flow: Flow) -> Axes:
    """``constant_pad_nd`` and the other pads: something before, something after."""
    axes, shape = list(flow.of(node.tensor(0))), node.out.shape
    amounts = list(node.args[1])
    constant = "constant" in node.op
    for k in range(len(amounts) // 2):
        d = len(axes) - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        if not before and not after:
            continue
        if not constant or before < 0 or after < 0:
            axes[d].fix(f"it is padded ({flow.where(node)})")
            axes[d] = Axis(shape[d], fixed="data")
            continue
        ends = [Axis(n, fixed="padding") for n in (before, after)]
        axes[d] = total((ends[0], axes[d], ends[1]))
    return tuple(axes)


def unfold(node: OpNode, flow: Flow) -> Axes:
    """``x.unfold(dim, size, step)``: windows along a dimension."""
    axes = list(flow.of(node.tensor(0)))
    if not axes:
        return (Axis(node.out.shape[-1], fixed="a window"),)
    dim = node.arg(1, "dimension") % len(axes)
    axes[dim].fix(f"a window slides over it ({flow.where(node)})")
    axes[dim] = Axis(node.out.shape[dim], fixed="data")
    return (*axes, Axis(node.out.shape[-1], fixed="a window"))


def unfold_backward(node: OpNode, flow: Flow) -> Axes:
    """``unfold_backward(x, sizes, dim, size, step)``: sums windows to where they were."""
    *axes, window = flow.of(node.tensor(0))
    dim = node.args[2] % len(node.out.shape)
    for axis in (axes[dim], window):
        axis.fix(f"a window slides over it ({flow.where(node)})")
    axes[dim] = Axis(node.out.shape[dim], fixed="data")
    sizes = zip(axes, node.out.shape, strict=True)
    return tuple(axis if axis.size == n else Axis(n) for axis, n in sizes)
