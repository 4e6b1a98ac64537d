"""Which axis of a quantizer's tensor is split over the tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

__all__ = ["Shard", "is_shared", "split_axis", "straddles"]


@dataclass(frozen=True)
class Shard:
    """How the tensor of one slot is split over the tensor-parallel ranks.

    Attributes:
        axis: The axis that is split: 0 or 1 of a weight ``(out, in)``, -1 of an activation.
        size: Number of ranks.
        rank: This one.
        parts: How many blocks a rank's slice is made of, each a slice of its own: 2 for gate and
            up of a gated MLP, which Megatron keeps in one weight.
    """

    axis: int
    size: int = 1
    rank: int = 0
    parts: int = 1


def split_axis(name: str, dims: int, spec: QuantizerSpec, shard: Shard | None) -> int | None:
    """Return the axis along which a tensor of a quantizer is split, ``None`` where it is whole.

    Args:
        name: Its name in `TensorQuantizer.state`.
        dims: Its number of dimensions; granularities keep reduced ones as 1.
        spec: The quantizer's spec.
        shard: How the quantized tensor is split, ``None`` where it is whole.
    """
    if shard is None or dims == 0 or name.startswith("global_") or name == "transforms.matrix":
        return None
    if name == "transforms.pre_scale":  # one number per input feature
        return dims - 1 if shard.axis in (1, -1) else None
    if name == "transforms.bias":
        axes = spec.affine.axes if spec.affine is not None else ()
        found = shard.axis % dims in {axis % dims for axis in axes}
    else:
        found = _varies(spec.granularity, shard.axis, dims)
    return shard.axis % dims if found else None


def is_shared(granularity: Granularity, axis: int, dims: int) -> bool:
    """Whether one scale belongs to elements of several ranks when ``axis`` is split."""
    return not _varies(granularity, axis, dims)


def straddles(spec: QuantizerSpec, shape: tuple[int, ...], shard: Shard) -> bool:
    """Whether a group of elements with one scale would lie across the border of a slice.

    Args:
        spec: The quantizer's spec.
        shape: That of the local weight.
        shard: How it is split.
    """
    size = shape[shard.axis] // shard.parts
    match spec.granularity:
        case PerGroup(size=group, axis=axis):
            return axis % len(shape) == shard.axis % len(shape) and size % group != 0
        case PerBlock(rows=rows, cols=cols):
            tiles = {len(shape) - 2: rows, len(shape) - 1: cols}
            return size % tiles.get(shard.axis % len(shape), 1) != 0
        case _:
            return False


def _varies(granularity: Granularity, axis: int, dims: int) -> bool:
    match granularity:
        case PerTensor():
            return False
        case PerChannel(axes=axes):
            return axis % dims in {kept % dims for kept in axes}
        case PerToken():
            return axis % dims != dims - 1
        case PerGroup() | PerBlock():
            return True
    return False
