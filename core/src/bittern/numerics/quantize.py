"""Quantize, dequantize, fake-quantize: written once for every format and granularity.

The law: ``fake_quantize(x) == dequantize(quantize(x))`` bit for bit. It holds by construction,
since both go through the same rounding (`Codec.round_`) and the same product with the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.chunked import Function, in_chunks, worth_chunks
from bittern.numerics.codec import LARGEST, Codec, Scales, codec_of
from bittern.numerics.layout import amax, as_blocks, check_dtype, expand_scale, from_blocks
from bittern.numerics.ranges import Range, check_scales, global_amax, measure, scales_for
from bittern.records import PerTensor, QuantizerSpec

__all__ = ["Quantized", "dequantize", "fake_quantize", "quantize", "scaled"]


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


def fake_quantize(
    x: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None = None,
    *,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Round ``x`` to what its quantized form decodes to.

    Args:
        x: Floating tensor of any shape.
        spec: Format and granularity.
        scales: Static scales; ``None`` computes them from ``x``.
        global_scale: The static upper level of a format of two levels, whose block scales are
            computed from ``x``.

    Returns:
        A tensor like ``x``. NaN and Inf propagate (as NaN); finite values beyond the range
        saturate.

    Raises:
        NumericsError: ``x`` is not floating, or negative in an unsigned format, or the scales do
            not fit its shape.
    """
    check_dtype(x)
    if x.numel() == 0:
        return x.clone()
    return _run(_rounded, x, spec, scales, global_scale=global_scale, dtype=x.dtype)[0]


def quantize(
    x: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None = None,
    *,
    global_scale: Tensor | None = None,
) -> Quantized:
    """Quantize ``x`` to codes.

    Args:
        x: Floating tensor of any shape, finite.
        spec: Format and granularity.
        scales: Static scales; ``None`` computes them from ``x``.
        global_scale: As for `fake_quantize`.

    Raises:
        NumericsError: ``x`` holds NaN or Inf, which no code stands for, is not floating, or
            negative in an unsigned format, or the scales do not fit its shape.
    """
    check_dtype(x)
    codec = codec_of(spec.format)
    if x.numel() == 0:
        if scales is None:
            scales = _scales_of(x, spec, global_scale)
        return Quantized(torch.empty_like(x, dtype=codec.storage), scales, spec, x.dtype)
    codes, found = _run(_codes, x, spec, scales, global_scale=global_scale, dtype=codec.storage)
    return Quantized(codes.contiguous(), found, spec, x.dtype)


def dequantize(quantized: Quantized) -> Tensor:
    """Return the values that the codes stand for, in the original dtype."""
    spec, scales = quantized.spec, quantized.scales
    if quantized.codes.numel() == 0:
        return torch.empty_like(quantized.codes, dtype=quantized.dtype)
    dtype, function = quantized.dtype, partial(_decoded, dtype=quantized.dtype)
    return _run(function, quantized.codes, spec, scales, global_scale=None, dtype=dtype)[0]


def scaled(values: Tensor, spec: QuantizerSpec, scales: Scales, dtype: torch.dtype) -> Tensor:
    """Return numbers of the grid times their scales: `dequantize` of codes that are loaded already.

    Args:
        values: Float32, what `Codec.load` returns.
        spec: Format and granularity.
        scales: The scales.
        dtype: Dtype of the result.
    """
    function = partial(_scaled, dtype=dtype)
    return _run(function, values, spec, scales, global_scale=None, dtype=dtype)[0]


def _run(
    function: Function,
    x: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None,
    *,
    global_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Scales]:
    """Apply one of the three functions below to a tensor, in chunks where that pays."""
    if scales is not None:
        check_scales(x, spec, scales)
    if not worth_chunks(x, scales, global_scale):
        values, found = function(x, spec, scales, global_scale)
        return values.to(dtype), found
    if scales is None and isinstance(spec.granularity, PerTensor):
        scales = _scales_of(x, spec, global_scale)
    elif scales is None and global_scale is None and codec_of(spec.format).two_level:
        global_scale = codec_of(spec.format).global_scale(global_amax(x, spec))
    return in_chunks(function, x, spec, scales, global_scale=global_scale, dtype=dtype)


def _rounded(
    x: Tensor, spec: QuantizerSpec, scales: Scales | None, global_scale: Tensor | None
) -> tuple[Tensor, Scales]:
    """Return ``x`` on the grid, in float32, and its scales."""
    codec, dtype, x = codec_of(spec.format), x.dtype, x.float()
    if not codec.signed and x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_sign(x, spec)  # elsewhere the check would wait for the device
    found = scales if scales is not None else _scales_of(x, spec, global_scale)
    blocks, step = as_blocks(x, spec.granularity), expand_scale(found.step, spec.granularity)
    values = blocks / step
    if found.zero_point is not None:
        zero = expand_scale(found.zero_point, spec.granularity)
        values = codec.round_(values.round_().add_(zero)).sub_(zero)
    else:
        values = codec.round_(values)
    # 0 * x adds nothing to a finite result, and keeps the Inf that clamping took away as NaN
    values = _saturated(values.mul_(step).add_(blocks, alpha=0), codec, dtype)
    return from_blocks(values, spec.granularity, x.shape), found


def _codes(
    x: Tensor, spec: QuantizerSpec, scales: Scales | None, global_scale: Tensor | None
) -> tuple[Tensor, Scales]:
    """Return the codes of ``x`` and its scales."""
    codec, x = codec_of(spec.format), x.float()
    low, high = torch.aminmax(x)  # both NaN where one is in x
    if not bool(low.isfinite() & high.isfinite()):
        raise NumericsError("cannot pack a tensor with NaN or Inf", hint="check the checkpoint")
    if not codec.signed:
        _check_sign(low, spec)
    found = scales if scales is not None else _scales_of(x, spec, global_scale)
    values = as_blocks(x, spec.granularity) / expand_scale(found.step, spec.granularity)
    if found.zero_point is not None:
        values = values.round_().add_(expand_scale(found.zero_point, spec.granularity))
    return from_blocks(codec.store(codec.round_(values)), spec.granularity, x.shape), found


def _decoded(
    codes: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None,
    global_scale: Tensor | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Scales]:
    """Return what codes stand for, in float32, as far as ``dtype`` holds it."""
    # Load before padding: torch pads no float8 tensor.
    values = codec_of(spec.format).load(codes)
    return _scaled(values, spec, scales, global_scale, dtype=dtype)


def _scaled(
    values: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None,
    global_scale: Tensor | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Scales]:
    """Return numbers of the grid times their scales, in float32, as far as ``dtype`` holds it."""
    assert scales is not None
    blocks = as_blocks(values, spec.granularity)
    if scales.zero_point is not None:
        blocks = blocks - expand_scale(scales.zero_point, spec.granularity)
    blocks = blocks * expand_scale(scales.step, spec.granularity)
    blocks = _saturated(blocks, codec_of(spec.format), dtype)
    return from_blocks(blocks, spec.granularity, values.shape), scales


def _scales_of(x: Tensor, spec: QuantizerSpec, global_scale: Tensor | None) -> Scales:
    """Return the scales of ``x`` by the format's rule, under a global scale that may be given."""
    found = measure(x, spec) if global_scale is None else Range(amax(x, spec.granularity))
    return scales_for(found, spec, x, global_scale=global_scale)


def _saturated(values: Tensor, codec: Codec, dtype: torch.dtype) -> Tensor:
    """Keep what was rounded up beyond the numbers of ``dtype`` from becoming Inf, in place."""
    if not codec.overshoots:
        return values
    limit = min(float(torch.finfo(dtype).max), LARGEST)
    return values.clamp_(-limit, limit)


def _check_sign(x: Tensor, spec: QuantizerSpec) -> None:
    if bool((x < 0).any()):
        raise NumericsError(
            f"{spec.format.name} holds no negative numbers, and the tensor does",
            hint="use a signed format, or an asymmetric one",
        )
