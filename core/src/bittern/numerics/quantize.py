"""Quantize, dequantize, fake-quantize: written once for every format and granularity.

The law: ``fake_quantize(x) == dequantize(quantize(x))`` bit for bit. It holds by construction,
since both go through the same rounding (`Codec.round_`) and the same product with the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.codec import Scales, codec_of
from bittern.numerics.layout import (
    amax,
    as_blocks,
    check_dtype,
    expand_scale,
    from_blocks,
    scale_shape,
)
from bittern.records import QuantizerSpec

__all__ = ["Quantized", "dequantize", "fake_quantize", "quantize", "scales_from_amax"]


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor: codes in the shape of the original, scales, and the original dtype.

    Attributes:
        codes: One code per element, in the codec's storage dtype.
        scales: Float32 scales in the granularity's shape.
        spec: Format and granularity.
        dtype: Dtype that `dequantize` returns.
    """

    codes: Tensor
    scales: Scales
    spec: QuantizerSpec
    dtype: torch.dtype


def scales_from_amax(values: Tensor, spec: QuantizerSpec) -> Scales:
    """Return the scales that the format's rule gives for an amax."""
    return codec_of(spec.format).scales(values)


def fake_quantize(x: Tensor, spec: QuantizerSpec, scales: Scales | None = None) -> Tensor:
    """Round ``x`` to what its quantized form decodes to.

    Args:
        x: Floating tensor of any shape.
        spec: Format and granularity.
        scales: Static scales; ``None`` computes them from ``x``.

    Returns:
        A tensor like ``x``. NaN propagates; values beyond the range saturate.

    Raises:
        NumericsError: ``x`` is not floating, or the scales do not fit its shape.
    """
    check_dtype(x)
    if x.numel() == 0:
        return x.clone()
    codec = codec_of(spec.format)
    values, scale = _grid_values(x, spec, scales)
    result = codec.round_(values).mul_(scale)
    return from_blocks(result, spec.granularity, x.shape).to(x.dtype)


def quantize(x: Tensor, spec: QuantizerSpec, scales: Scales | None = None) -> Quantized:
    """Quantize ``x`` to codes.

    Args:
        x: Floating tensor of any shape, finite.
        spec: Format and granularity.
        scales: Static scales; ``None`` computes them from ``x``.

    Raises:
        NumericsError: ``x`` holds NaN or Inf, which no code stands for, is not floating, or the
            scales do not fit its shape.
    """
    check_dtype(x)
    # float64 goes through float32, where it may be too large
    if not bool(torch.isfinite(x.float() if x.dtype == torch.float64 else x).all()):
        raise NumericsError("cannot pack a tensor with NaN or Inf", hint="check the checkpoint")
    codec = codec_of(spec.format)
    if scales is None:
        scales = codec.scales(amax(x, spec.granularity))
    if x.numel() == 0:
        return Quantized(torch.empty_like(x, dtype=codec.storage), scales, spec, x.dtype)
    values, _ = _grid_values(x, spec, scales)
    codes = from_blocks(codec.store(codec.round_(values)), spec.granularity, x.shape)
    return Quantized(codes.contiguous(), scales, spec, x.dtype)


def dequantize(quantized: Quantized) -> Tensor:
    """Return the values that the codes stand for, in the original dtype."""
    spec = quantized.spec
    if quantized.codes.numel() == 0:
        return torch.empty_like(quantized.codes, dtype=quantized.dtype)
    codec = codec_of(spec.format)
    # Load before padding: torch pads no float8 tensor.
    values = as_blocks(codec.load(quantized.codes), spec.granularity)
    result = values * expand_scale(quantized.scales.scale, spec.granularity)
    return from_blocks(result, spec.granularity, quantized.codes.shape).to(quantized.dtype)


def _grid_values(x: Tensor, spec: QuantizerSpec, scales: Scales | None) -> tuple[Tensor, Tensor]:
    """Return ``x / scale`` as a fresh float32 tensor in block layout, and the scale for it."""
    if scales is None:
        scales = codec_of(spec.format).scales(amax(x, spec.granularity))
    elif scales.scale.shape != scale_shape(x.shape, spec.granularity):
        raise NumericsError(
            f"scales of shape {tuple(scales.scale.shape)} do not fit a tensor of shape "
            f"{tuple(x.shape)} with granularity {spec.granularity}",
            hint="calibrate again with data of this shape, or use dynamic scales",
        )
    scale = expand_scale(scales.scale, spec.granularity)
    return as_blocks(x.float(), spec.granularity) / scale, scale
