"""Operators that slide over space: convolutions, pooling, resizing, pixel shuffles."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis, product
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = [
    "channel_shuffle",
    "col2im",
    "conv",
    "conv_transpose",
    "convolution",
    "fractional",
    "grid_sampler",
    "im2col",
    "pixel_shuffle",
    "pixel_unshuffle",
    "spatial",
    "unpool",
]

SPACE = "data"


def _slide(axes: Axes, shape: tuple[int, ...], node: OpNode, flow: Flow) -> Axes:
    """Return the new axes of the dimensions that a window slides over."""
    for axis in axes:
        if axis.size != 1:
            axis.fix(f"a window slides over it ({flow.where(node)})")
    return tuple(Axis(n, fixed=SPACE) for n in shape)


def conv(node: OpNode, flow: Flow) -> Axes:
    """``conv1d`` to ``conv3d``: ``weight`` is ``(out, in / groups, *window)``."""
    return _conv(node, flow, groups=node.arg(6, "groups", 1), transposed=False)


def conv_transpose(node: OpNode, flow: Flow) -> Axes:
    """``conv_transpose1d`` to ``3d``: ``weight`` is ``(in, out / groups, *window)``."""
    return _conv(node, flow, groups=node.arg(6, "groups", 1), transposed=True)


def convolution(node: OpNode, flow: Flow) -> Axes:
    """``aten.convolution``, which says itself whether it is transposed."""
    return _conv(node, flow, groups=node.args[8], transposed=node.args[6])


def _conv(node: OpNode, flow: Flow, *, groups: int, transposed: bool) -> Axes:
    x, weight = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    space = len(weight) - 2
    where = flow.where(node)
    for axis in weight[2:]:
        axis.fix("it is the window of a convolution")
    batch, channels = x[: -space - 1], x[-space - 1]
    full, part = weight[0], weight[1]  # one dimension is whole, the other is that of one group
    if transposed:
        full = flow.same(full, channels)
    if groups > 1:
        group, _ = flow.factor(full, (groups, full.size // groups), where)
        if transposed:
            made = product((group, part))
        else:
            group2, inside = flow.factor(channels, (groups, channels.size // groups), where)
            flow.same(group, group2)
            flow.same(inside, part)
            made = full
    elif transposed:
        made = part
    else:
        flow.same(channels, part)
        made = full
    bias = node.arg(2, "bias")
    if isinstance(bias, Value):
        flow.same(made, flow.of(bias)[0])
    return (*batch, made, *_slide(x[-space:], node.out.shape[-space:], node, flow))


def spatial(node: OpNode, flow: Flow, dims: int = 2) -> list[Axes | None]:
    """Pooling and resizing: the last ``dims`` dimensions change, the others stay."""
    axes = flow.of(node.tensor(0))
    made: list[Axes | None] = []
    for value in node.outputs:
        if value is None:
            made.append(None)
            continue
        made.append((*axes[:-dims], *_slide(axes[-dims:], value.shape[-dims:], node, flow)))
    return made


def unpool(node: OpNode, flow: Flow, dims: int = 2) -> list[Axes | None]:
    """``max_unpool2d(x, indices, size)``: every value goes to where its index says."""
    flow.together([flow.of(node.tensor(0)), flow.of(node.tensor(1))])
    return spatial(node, flow, dims)


def fractional(node: OpNode, flow: Flow, dims: int = 2) -> list[Axes | None]:
    """``fractional_max_pool2d(x, window, size, samples)``: samples are ``(N, C, dims)``."""
    x, (batch, channels, places) = flow.of(node.tensor(0)), flow.of(node.tensor(3))
    places.fix(f"its positions are directions ({flow.where(node)})")
    flow.same(x[-dims - 1], channels)
    if len(x) == dims + 2:
        flow.same(x[0], batch)
    return spatial(node, flow, dims)


def grid_sampler(node: OpNode, flow: Flow) -> Axes:
    """``grid_sampler_2d(x, grid)``: ``(N, C, *in)`` is looked up at ``(N, *out, places)``."""
    (batch, channels, *space), (batch2, *out, places) = (flow.of(node.tensor(k)) for k in (0, 1))
    _slide(tuple(space), (), node, flow)
    places.fix("its positions are directions in space")
    return (flow.same(batch, batch2), channels, *out)


def channel_shuffle(node: OpNode, flow: Flow) -> Axes:
    """``channel_shuffle(x, groups)``: channels are ``groups x within``, and change over."""
    axes = flow.of(node.tensor(0))
    dim, groups = len(axes) - 3, node.arg(1, "groups")
    outer, inner = flow.factor(axes[dim], (groups, axes[dim].size // groups), flow.where(node))
    return (*axes[:dim], product((inner, outer)), *axes[dim + 1 :])


def pixel_shuffle(node: OpNode, flow: Flow) -> Axes:
    """``pixel_shuffle(x, r)``: channels are ``C x r x r``, the last two go into space."""
    *batch, channels, height, width = flow.of(node.tensor(0))
    r = node.arg(1, "upscale_factor")
    kept, *places = flow.factor(channels, (channels.size // r**2, r, r), flow.where(node))
    for place in places:
        place.fix("it becomes a place in the picture")
    return (*batch, kept, *_slide((height, width), node.out.shape[-2:], node, flow))


def pixel_unshuffle(node: OpNode, flow: Flow) -> Axes:
    """``pixel_unshuffle(x, r)``: the reverse."""
    *batch, channels, height, width = flow.of(node.tensor(0))
    r = node.arg(1, "downscale_factor")
    places = [Axis(r, fixed="it was a place in the picture") for _ in range(2)]
    space = _slide((height, width), node.out.shape[-2:], node, flow)
    return (*batch, product((channels, *places)), *space)


def col2im(node: OpNode, flow: Flow) -> Axes:
    """``fold(x, size, window)``: ``(N, C x window, places)`` to ``(N, C, H, W)``."""
    *batch, columns, places = flow.of(node.tensor(0))
    channels = node.out.shape[-3]
    sizes = (channels, columns.size // channels)
    kept, window = flow.factor(columns, sizes, flow.where(node))
    window.fix("it is a window")
    return (*batch, kept, *_slide((places,), node.out.shape[-2:], node, flow))


def im2col(node: OpNode, flow: Flow) -> Axes:
    """``unfold(x, window)``: ``(N, C, H, W)`` to ``(N, C x window, places)``."""
    *batch, channels, _, _ = flow.of(node.tensor(0))
    window = Axis(node.out.shape[-2] // channels.size, fixed="it is a window")
    space = _slide(flow.of(node.tensor(0))[-2:], node.out.shape[-1:], node, flow)
    return (*batch, product((channels, window)), *space)
