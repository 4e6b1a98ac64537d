"""Quantized tensors in as few bytes as their format promises: packed codes, scales in their types.

Codes of 4 bits lie two in a byte, those of 2, 3, 5, 6, 7 bits in dense strings of 32-bit words, all
along the last axis, and every row starts anew. Scales of the MX formats are e8m0 bytes, block
scales of nvfp4 are e4m3, all others float32. Zero points are packed as codes are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bittern.numerics.codec import Codec, Scales, codec_of
from bittern.numerics.layout import scale_shape
from bittern.numerics.lookup import look_up, takes
from bittern.numerics.packing import (
    from_offset_binary,
    offset_binary,
    pack_bits,
    pack_nibbles,
    unpack_bits,
    unpack_nibbles,
)
from bittern.numerics.quantize import Quantized, dequantize, scaled
from bittern.numerics.stored import e4m3_scales, e8m0_bytes, e8m0_scales
from bittern.records import QuantizerSpec

__all__ = ["PARTS", "compact", "compact_layout", "decode", "expand"]

PARTS = ("codes", "scale", "zero_point", "global_scale")
WORD = 32

Shape = tuple[int, ...]


def compact(quantized: Quantized) -> dict[str, Tensor]:
    """Return the parts of a quantized tensor, by the names of `PARTS`, as `compact_layout` says.

    Raises:
        NumericsError: A code or scale is none that the format stores.
    """
    spec, scales = quantized.spec, quantized.scales
    codec = codec_of(spec.format)
    scale = scales.scale
    if _scale_dtype(spec, codec) == torch.uint8:
        scale = e8m0_bytes(scale)
    elif _scale_dtype(spec, codec) == torch.float8_e4m3fn:
        scale = e4m3_scales(scale)
    found = {"codes": _pack(quantized.codes, spec.format.bits), "scale": scale.contiguous()}
    if scales.zero_point is not None:
        zero = scales.zero_point.to(codec.storage)
        zero = zero.reshape(_zeros(zero.shape, spec.format.bits))
        found["zero_point"] = _pack(zero, spec.format.bits)
    if scales.global_scale is not None:
        found["global_scale"] = scales.global_scale.contiguous()
    return found


def expand(
    parts: Mapping[str, Tensor], shape: Shape, spec: QuantizerSpec, dtype: torch.dtype
) -> Quantized:
    """Undo `compact`.

    Args:
        parts: The parts.
        shape: Shape of the tensor.
        spec: Format and granularity.
        dtype: Dtype of what the codes stand for.
    """
    codec = codec_of(spec.format)
    codes = _unpack(parts["codes"], spec.format.bits, shape, codec.storage)
    return Quantized(codes, _scales(parts, spec, codec), spec, dtype)


def decode(
    parts: Mapping[str, Tensor], shape: Shape, spec: QuantizerSpec, dtype: torch.dtype
) -> Tensor:
    """Return what the parts stand for: `dequantize` of `expand`, bit for bit, and faster.

    Args:
        parts: The parts.
        shape: Shape of the tensor.
        spec: Format and granularity.
        dtype: Dtype of the result.
    """
    codec, codes = codec_of(spec.format), parts["codes"]
    nibbles = spec.format.bits == 4 and _is_packed(shape, 4, codec.storage)
    if takes(codes) and codes.numel() and (nibbles or codes.dtype != torch.int8):  # a cast is fast
        values = look_up(codes, codec, nibbles=nibbles, length=shape[-1] if shape else 1)
        if values is not None:
            scales = _scales(parts, spec, codec)
            return scaled(values.view(shape) if not shape else values, spec, scales, dtype)
    return dequantize(expand(parts, shape, spec, dtype))


def compact_layout(shape: Shape, spec: QuantizerSpec) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return shape and dtype of every part that `compact` returns for a tensor of ``shape``.

    Raises:
        NumericsError: The tensor has too few dimensions for the granularity.
    """
    codec, bits = codec_of(spec.format), spec.format.bits
    scales = scale_shape(shape, spec.granularity)
    found = {
        "codes": _packed_layout(shape, bits, codec.storage),
        "scale": (scales, _scale_dtype(spec, codec)),
    }
    if codec.asymmetric:
        found["zero_point"] = _packed_layout(_zeros(scales, bits), bits, codec.storage)
    if codec.two_level:
        stack = (shape[0], *([1] * (len(shape) - 1))) if spec.stacked else ()
        found["global_scale"] = (stack, torch.float32)
    return found


def _scales(parts: Mapping[str, Tensor], spec: QuantizerSpec, codec: Codec) -> Scales:
    scale = parts["scale"]
    scale = e8m0_scales(scale) if scale.dtype == torch.uint8 else scale.float()
    zero = parts.get("zero_point")
    if zero is not None:
        bits, shape = spec.format.bits, tuple(scale.shape)
        zero = _unpack(zero, bits, _zeros(shape, bits), codec.storage).reshape(shape).float()
    return Scales(scale, zero, parts.get("global_scale"))


def _zeros(shape: Shape, bits: int) -> Shape:
    """Return the shape in which zero points are packed: few per row do not fill a word."""
    return tuple(shape) if bits in (4, 8) else (math.prod(shape),)


def _scale_dtype(spec: QuantizerSpec, codec: Codec) -> torch.dtype:
    if spec.format.scale_bits != 8:
        return torch.float32
    return torch.float8_e4m3fn if codec.two_level else torch.uint8


def _is_packed(shape: Shape, bits: int, storage: torch.dtype) -> bool:
    return 2 <= bits < 8 and not storage.is_floating_point and len(shape) > 0


def _packed_layout(shape: Shape, bits: int, storage: torch.dtype) -> tuple[Shape, torch.dtype]:
    if not _is_packed(shape, bits, storage):
        return tuple(shape), storage
    if bits == 4:
        return (*shape[:-1], -(-shape[-1] // 2)), torch.uint8
    return (*shape[:-1], -(-shape[-1] * bits // WORD)), torch.int32


def _pack(codes: Tensor, bits: int) -> Tensor:
    if not _is_packed(codes.shape, bits, codes.dtype):
        return codes.contiguous()
    if bits == 4:
        return pack_nibbles(codes)
    return pack_bits(offset_binary(codes, bits) if codes.dtype.is_signed else codes, bits)


def _unpack(packed: Tensor, bits: int, shape: Shape, storage: torch.dtype) -> Tensor:
    if not _is_packed(shape, bits, storage):
        return packed
    if bits == 4:
        return unpack_nibbles(packed, shape[-1], signed=storage.is_signed)
    codes = unpack_bits(packed, bits, shape[-1])
    return from_offset_binary(codes, bits) if storage.is_signed else codes
