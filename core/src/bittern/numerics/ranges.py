"""Ranges of tensors, and the scales that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.codec import Codec, Scales, codec_of
from bittern.numerics.layout import (
    amax,
    as_blocks,
    as_scale,
    block_dims,
    expand_scale,
    extremes,
    scale_shape,
)
from bittern.records import PerBlock, PerChannel, PerGroup, PerTensor, QuantizerSpec

__all__ = [
    "Range",
    "check_scales",
    "check_spec",
    "global_amax",
    "measure",
    "scales_for",
    "scales_from_amax",
]


@dataclass(frozen=True)
class Range:
    """What the scales of a tensor follow from, float32.

    Attributes:
        amax: Largest magnitude per scale, in the granularity's shape; with ``amin``, the largest
            value.
        amin: Smallest value per scale, never positive; asymmetric formats only.
        global_amax: Largest magnitude of the whole tensor: ``()``, or ``(n, 1, ..)`` for ``n``
            stacked tensors; formats of two levels only.
    """

    amax: Tensor
    amin: Tensor | None = None
    global_amax: Tensor | None = None


def measure(x: Tensor, spec: QuantizerSpec) -> Range:
    """Return the range of a tensor, as far as its format needs it.

    Args:
        x: Floating tensor.
        spec: Format and granularity.

    Raises:
        NumericsError: ``x`` is not a real floating tensor, or has too few dimensions.
    """
    codec = codec_of(spec.format)
    if codec.asymmetric:
        low, high = extremes(x, spec.granularity)
        return Range(high, amin=low)
    values = amax(x, spec.granularity)
    return Range(values, global_amax=global_amax(x, spec) if codec.two_level else None)


def global_amax(x: Tensor, spec: QuantizerSpec) -> Tensor:
    """Return the largest magnitude of a tensor, or of each that it stacks."""
    return amax(x, PerChannel(0) if spec.stacked else PerTensor())


def scales_for(
    values: Range,
    spec: QuantizerSpec,
    x: Tensor | None = None,
    *,
    global_scale: Tensor | None = None,
) -> Scales:
    """Return the scales that the format's rule gives for a range.

    Args:
        values: The range.
        spec: Format and granularity.
        x: The tensor itself. Formats that choose between two scales per block (``Codec.fitted``)
            look at the rounding errors; without it they take the first.
        global_scale: A given upper level for formats of two; by default it follows from
            ``global_amax``, or from the largest ``amax``.

    Raises:
        NumericsError: An asymmetric format, and no ``amin``; a format of blocks, and a granularity
            without.
    """
    codec = codec_of(spec.format)
    check_spec(spec)
    if codec.asymmetric:
        if values.amin is None:
            raise NumericsError(
                f"{spec.format.name} is asymmetric: it needs both ends of a range",
                hint="give Range(amax=..., amin=...), or use a symmetric format",
            )
        return codec.scales_between(values.amin, values.amax)
    if not codec.two_level:
        scales = codec.scales(values.amax)
        return scales if x is None or not codec.fitted else _fit(x, values.amax, spec, scales)
    if global_scale is None:
        largest = values.global_amax
        if largest is None:
            largest = global_amax(values.amax, spec)
        global_scale = codec.global_scale(largest.float())
    found = Scales(codec.scales(values.amax, global_scale).scale, global_scale=global_scale)
    return found if x is None or not codec.fitted else _fit(x, values.amax, spec, found)


def scales_from_amax(values: Tensor, spec: QuantizerSpec) -> Scales:
    """Return the scales that the format's rule gives for an amax.

    Raises:
        NumericsError: As for `scales_for`, or a value is negative or NaN.
    """
    if not bool((values >= 0).all()):
        raise NumericsError(
            "an amax is negative or NaN", hint="look for NaN in the weights or the calibration data"
        )
    return scales_for(Range(values), spec)


def check_spec(spec: QuantizerSpec) -> None:
    """Raise unless the format can have scales of this granularity.

    Raises:
        NumericsError: It has scales per block, and the granularity is coarser or finer.
    """
    if spec.format.block_only and not isinstance(spec.granularity, PerGroup | PerBlock):
        raise NumericsError(
            f"{spec.format.name} has one scale per group or block, not per {spec.granularity}",
            hint=f"use {spec.format.weight_granularity}",
        )


def check_scales(x: Tensor, spec: QuantizerSpec, scales: Scales) -> None:
    """Raise unless static scales fit a tensor.

    Raises:
        NumericsError: Their shape is another, or a part of them is missing.
    """
    check_spec(spec)
    if scales.scale.shape != scale_shape(x.shape, spec.granularity):
        raise NumericsError(
            f"scales of shape {tuple(scales.scale.shape)} do not fit a tensor of shape "
            f"{tuple(x.shape)} with granularity {spec.granularity}",
            hint="calibrate again with data of this shape, or use dynamic scales",
        )
    codec = codec_of(spec.format)
    for needed, part, what in (
        (codec.asymmetric, scales.zero_point, "zero points"),
        (codec.two_level, scales.global_scale, "a global scale"),
    ):
        if needed and part is None:
            raise NumericsError(
                f"{spec.format.name} needs {what} beside its scales",
                hint="take whole Scales, as scales_for returns them",
            )


def _fit(x: Tensor, values: Tensor, spec: QuantizerSpec, first: Scales) -> Scales:
    """Return per block the scale with the smaller squared error."""
    codec = codec_of(spec.format)
    second = Scales(codec.other_scale(values, first.global_scale), global_scale=first.global_scale)
    blocks = as_blocks(x.float(), spec.granularity)
    errors = [_error(blocks, scales.step, codec, spec) for scales in (first, second)]
    scale = torch.where(errors[1] < errors[0], second.scale, first.scale)
    return Scales(scale, global_scale=first.global_scale)


def _error(blocks: Tensor, step: Tensor, codec: Codec, spec: QuantizerSpec) -> Tensor:
    """Return the sum of squared rounding errors per scale, in units of its largest magnitude.

    Without the units, the squares of tiny and huge numbers would be 0 and Inf. They are added in
    one order, half to half, so that every device and layout chooses the same scale.
    """
    wide, dims = expand_scale(step, spec.granularity), block_dims(spec.granularity, blocks.dim())
    unit = blocks.abs()
    unit = unit.amax(dim=dims, keepdim=True) if dims else unit
    error = codec.round_(blocks / wide).mul_(wide).sub_(blocks)
    error = error.div_(unit.clamp_min_(torch.finfo(torch.float32).tiny)).square_()
    return as_scale(_tree_sum(error, dims), spec.granularity)


def _tree_sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Add up over ``dims``, which are kept as 1, always in the same order; writes to ``values``."""
    if dims and torch.compiler.is_compiling():  # Triton fails on the kernel of the loop below
        return values.sum(dims, keepdim=True)
    for dim in dims:
        while (size := values.shape[dim]) > 1:
            rest = size // 2
            high = values.narrow(dim, size - rest, rest)
            values = values.narrow(dim, 0, size - rest)
            values.narrow(dim, 0, rest).add_(high)
    return values
