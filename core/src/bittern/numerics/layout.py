"""Granularity as tensor layout: views in which the scale broadcasts, and amax over them.

Shapes for an input of shape ``(..., n)``: PerTensor ``()``; PerChannel ``(1, .., c, .., 1)``;
PerToken ``(..., 1)``; PerGroup(g) ``(..., ceil(n / g))``; PerBlock(r, c)
``(..., ceil(m / r), ceil(n / c))``. Partial groups and blocks are padded virtually with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.records import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken

__all__ = [
    "amax",
    "as_blocks",
    "as_scale",
    "block_dims",
    "check_dtype",
    "expand_scale",
    "extremes",
    "from_blocks",
    "scale_shape",
]


def as_blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """Return ``x`` as a view (a padded copy for partial groups) in which scales broadcast."""
    match granularity:
        case PerGroup(size=size, axis=axis):
            x = x.movedim(axis, -1)
            n = x.shape[-1]
            size = min(size, max(n, 1))  # one group: nothing to pad
            if n % size:
                x = torch.nn.functional.pad(x, (0, size - n % size))
            return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
        case PerBlock(rows=rows, cols=cols):
            m, n = x.shape[-2], x.shape[-1]
            rows, cols = min(rows, max(m, 1)), min(cols, max(n, 1))
            if m % rows or n % cols:
                x = torch.nn.functional.pad(x, (0, -n % cols, 0, -m % rows))
            *lead, m, n = x.shape
            return x.reshape(*lead, m // rows, rows, n // cols, cols).transpose(-3, -2)
        case _:
            return x


def from_blocks(blocks: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """Undo `as_blocks`: return a tensor of ``shape``, padding cut off."""
    match granularity:
        case PerGroup(axis=axis):
            flat = blocks.flatten(-2)
            size = shape[axis]
            padded = flat.shape[-1] != size
            flat = (flat[..., :size] if padded else flat).movedim(-1, axis)
            return flat.contiguous() if padded else flat
        case PerBlock():
            flat = blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)
            padded = flat.shape != shape
            return flat[..., : shape[-2], : shape[-1]].contiguous() if padded else flat
        case _:
            return blocks


def expand_scale(scale: Tensor, granularity: Granularity) -> Tensor:
    """Return ``scale`` so that it broadcasts against `as_blocks` of its tensor."""
    match granularity:
        case PerGroup(axis=axis):
            return scale.movedim(axis, -1).unsqueeze(-1)
        case PerBlock():
            return scale.unsqueeze(-1).unsqueeze(-1)
        case _:
            return scale


def block_dims(granularity: Granularity, rank: int) -> tuple[int, ...]:
    """Return the dimensions of `as_blocks` of a tensor of ``rank`` that share one scale."""
    match granularity:
        case PerTensor():
            return tuple(range(rank))
        case PerChannel(axes=axes):
            keep = {axis % rank for axis in axes}
            return tuple(dim for dim in range(rank) if dim not in keep)
        case PerToken() | PerGroup():
            return (-1,)
        case PerBlock():
            return (-2, -1)


def scale_shape(shape: torch.Size | tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of the scale of a tensor of ``shape``.

    Raises:
        NumericsError: The tensor has too few dimensions for the granularity.
    """
    _check_rank(len(shape), granularity)
    match granularity:
        case PerTensor():
            return ()
        case PerChannel(axes=axes):
            keep = {axis % len(shape) for axis in axes}
            return tuple(size if i in keep else 1 for i, size in enumerate(shape))
        case PerToken():
            return (*shape[:-1], 1)
        case PerGroup(size=size, axis=axis):
            grouped = list(shape)
            grouped[axis] = -(-shape[axis] // size)
            return tuple(grouped)
        case PerBlock(rows=rows, cols=cols):
            return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // cols))


def amax(x: Tensor, granularity: Granularity) -> Tensor:
    """Return the largest magnitude per scale, float32; NaN and Inf propagate.

    Args:
        x: Any floating tensor. An empty one has amax 0.
        granularity: Which elements share a scale.

    Raises:
        NumericsError: ``x`` is not a real floating tensor, or has too few dimensions.
    """
    check_dtype(x)
    shape = scale_shape(x.shape, granularity)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if isinstance(granularity, PerTensor):
        low, high = torch.aminmax(x)  # one pass, no temporary; abs().amax() makes one
        return torch.maximum(low.abs(), high.abs()).float()
    dims = block_dims(granularity, x.dim())
    if not dims:
        return x.abs().float()
    values = as_blocks(x, granularity).abs().amax(dim=dims, keepdim=True)
    return as_scale(values, granularity).float()


def extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value per scale, float32, 0 included in the range.

    Args:
        x: Any floating tensor. An empty one has the range 0 to 0.
        granularity: Which elements share a scale.

    Raises:
        NumericsError: ``x`` is not a real floating tensor, or has too few dimensions.
    """
    check_dtype(x)
    shape = scale_shape(x.shape, granularity)
    if x.numel() == 0:
        zero = torch.zeros(shape, dtype=torch.float32, device=x.device)
        return zero, zero.clone()
    blocks, dims = as_blocks(x, granularity), block_dims(granularity, x.dim())
    low = blocks.amin(dim=dims, keepdim=True) if dims else blocks
    high = blocks.amax(dim=dims, keepdim=True) if dims else blocks
    low, high = (as_scale(v, granularity) for v in (low, high))
    return low.float().clamp_max(0.0), high.float().clamp_min(0.0)


def check_dtype(x: Tensor) -> None:
    """Raise unless ``x`` holds real floating numbers of 16 bits or more.

    Raises:
        NumericsError: It does not.
    """
    if not x.is_floating_point() or x.element_size() < 2:
        raise NumericsError(
            f"cannot quantize a tensor of dtype {x.dtype}",
            hint="float16, bfloat16, float32 and float64 can be quantized",
        )


def as_scale(values: Tensor, granularity: Granularity) -> Tensor:
    """Return what was reduced over `block_dims`, dimensions kept, in the shape of scales."""
    match granularity:
        case PerGroup(axis=axis):
            return values.squeeze(-1).movedim(-1, axis)
        case PerBlock():
            return values.squeeze(-1).squeeze(-1)
        case PerTensor():
            return values.reshape(())
        case _:
            return values


def _check_rank(rank: int, granularity: Granularity) -> None:
    match granularity:
        case PerTensor():
            return
        case PerChannel(axes=axes):
            needed = max(axis + 1 if axis >= 0 else -axis for axis in axes)
        case PerGroup(axis=axis):
            needed = axis + 1 if axis >= 0 else -axis
        case PerBlock():
            needed = 2
        case _:
            needed = 1
    if rank < needed:
        raise NumericsError(
            f"a tensor with {rank} dimensions has no granularity {granularity}",
            hint=f"it needs at least {needed}; granularity: tensor always works",
        )
