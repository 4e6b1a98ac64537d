"""Large tensors on the CPU, chunk by chunk: the same functions, while the data lies in the cache.

Quantization is a dozen elementwise operations. On a whole weight each of them makes a pass over
main memory, most into pages that the operating system has just cleared; on a chunk that fits the
cache only reading the input and writing the result do. There is no second arithmetic here: a chunk
is a slice of the tensor that holds whole groups and blocks, and goes through the functions of
quantize.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bittern.numerics.codec import Scales
from bittern.numerics.layout import scale_shape
from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

__all__ = ["CHUNK", "in_chunks", "worth_chunks"]

# Elements per chunk and thread, 1 MiB in float32. Larger chunks leave the cache; smaller ones pay
# for calling torch a dozen times each.
CHUNK = 2**18

Index = tuple[slice, ...]
Function = Callable[[Tensor, QuantizerSpec, Scales | None, Tensor | None], tuple[Tensor, Scales]]


def worth_chunks(x: Tensor, scales: Scales | None, global_scale: Tensor | None) -> bool:
    """Whether ``x`` is large, on the CPU, and nothing looks at what is computed with it.

    Autograd, functorch, compilers and tensor subclasses take the whole tensor at once.
    """
    if torch.compiler.is_compiling() or x.numel() <= CHUNK or x.device.type != "cpu":
        return False
    if torch._C._get_tracing_state():
        return False
    given = [x, global_scale]
    if scales is not None:
        given += [scales.scale, scales.zero_point, scales.global_scale]
    tensors = [tensor for tensor in given if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
    )


def in_chunks(
    function: Function,
    x: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None,
    *,
    global_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Scales]:
    """Return what ``function`` returns for the whole tensor, computed from its chunks.

    Args:
        function: Called as ``function(chunk, spec, scales, global_scale)`` with a view that it must
            not write to; returns the chunk's result and scales.
        x: Tensor on the CPU, not empty.
        spec: Format and granularity.
        scales: Static scales. ``None``: the function computes those of a chunk, so that chunks hold
            whole regions of one scale, and a ``PerTensor`` tensor is one chunk.
        global_scale: The upper level of a format of two, if the function computes scales.
        dtype: Dtype of the result.
    """
    result = torch.empty_like(x, dtype=dtype)
    region = _region(x.shape, spec.granularity)
    made: dict[str, Tensor] = {}
    for index in _chunks(x, _grain(x, spec, dynamic=scales is None)):
        given = None if scales is None else _part(scales, index, region)
        upper = None if global_scale is None else _sliced(global_scale, index, (1,) * x.dim())
        values, found = function(x[index], spec, given, upper)
        result[index].copy_(values)
        if scales is None:
            _collect(made, found, scale_shape(x.shape, spec.granularity), index, region)
    return result, Scales(global_scale=global_scale, **made) if scales is None else scales


def _grain(x: Tensor, spec: QuantizerSpec, *, dynamic: bool) -> tuple[int, ...]:
    """Return the extents that chunks are multiples of."""
    if dynamic or isinstance(spec.granularity, PerGroup | PerBlock):
        return _region(x.shape, spec.granularity)
    return (1,) * x.dim()


def _region(shape: torch.Size, granularity: Granularity) -> tuple[int, ...]:
    """Return the extents of the regions of a tensor that share one scale."""
    region = [1] * len(shape)
    match granularity:
        case PerTensor():
            region = list(shape)
        case PerChannel(axes=axes):
            keep = {axis % len(shape) for axis in axes}
            region = [1 if dim in keep else size for dim, size in enumerate(shape)]
        case PerToken():
            region[-1] = shape[-1]
        case PerGroup(size=size, axis=axis):
            region[axis] = size
        case PerBlock(rows=rows, cols=cols):
            region[-2:] = rows, cols
    return tuple(region)


def _chunks(x: Tensor, grain: tuple[int, ...]) -> Iterator[Index]:
    """Yield the indices of parts of about `CHUNK` elements per thread, in the order of memory."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    shape, steps = [x.shape[dim] for dim in order], [grain[dim] for dim in order]
    for index in _split(shape, steps, CHUNK * torch.get_num_threads()):
        yield tuple(index[order.index(dim)] for dim in range(x.dim()))


def _split(shape: list[int], grain: list[int], room: int) -> Iterator[Index]:
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    step = min(max(room // inner // grain[0], 1) * grain[0], shape[0])
    for start in range(0, shape[0], step):
        for rest in _split(shape[1:], grain[1:], room // step):
            yield (slice(start, min(start + step, shape[0])), *rest)


def _sliced(scale: Tensor, index: Index, region: tuple[int, ...]) -> Tensor:
    """Return the part of a scale that belongs to a part of its tensor, as a view."""
    if not scale.dim():
        return scale
    places = zip(scale.shape, index, region, strict=True)
    return scale[
        tuple(
            slice(None) if size == 1 else slice(at.start // extent, -(-at.stop // extent))
            for size, at, extent in places
        )
    ]


def _part(scales: Scales, index: Index, region: tuple[int, ...]) -> Scales:
    """Return the scales that belong to a part of their tensor."""
    zero, upper = scales.zero_point, scales.global_scale
    return Scales(
        _sliced(scales.scale, index, region),
        zero_point=None if zero is None else _sliced(zero, index, region),
        global_scale=None if upper is None else _sliced(upper, index, (1,) * len(index)),
    )


def _collect(
    made: dict[str, Tensor],
    found: Scales,
    shape: tuple[int, ...],
    index: Index,
    region: tuple[int, ...],
) -> None:
    """Write the scales of a part into those of the whole tensor."""
    for name in ("scale", "zero_point"):
        value: Tensor | None = getattr(found, name)
        if value is not None:
            whole = made.setdefault(name, value.new_empty(shape))
            _sliced(whole, index, region).copy_(value)
