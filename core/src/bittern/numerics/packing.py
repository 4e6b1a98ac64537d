"""Codes packed as checkpoints hold them: nibbles, dense bit strings, GPTQ, AWQ.

Pure functions on codes of one integer each. A partial last byte or word is filled with zeros;
unpacking is told the length. Blocks of GGUF are in gguf.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.errors import NumericsError

__all__ = [
    "check_codes",
    "from_offset_binary",
    "offset_binary",
    "pack_awq",
    "pack_bits",
    "pack_gptq",
    "pack_nibbles",
    "unpack_awq",
    "unpack_bits",
    "unpack_gptq",
    "unpack_nibbles",
]

WORD = 32
# AutoAWQ's kernels read an int32 of eight columns in this order.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def check_codes(codes: Tensor, low: int, high: int) -> None:
    """Raise unless all codes are integers from ``low`` to ``high``.

    Raises:
        NumericsError: They are not, and would spill into their neighbors.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise NumericsError(
            f"cannot pack a tensor of dtype {codes.dtype}", hint="give integer codes"
        )
    if codes.numel():
        least, most = (int(value) for value in torch.aminmax(codes))
        if least < low or most > high:
            raise NumericsError(
                f"codes from {least} to {most} do not fit into {low} to {high}",
                hint="give the number of bits that the codes were made with",
            )


def offset_binary(codes: Tensor, bits: int) -> Tensor:
    """Return signed codes plus ``2^(bits-1)``, int32, as compressed-tensors, GPTQ, AWQ hold them.

    Raises:
        NumericsError: A code is no signed integer of ``bits`` bits.
    """
    half = 1 << (bits - 1)
    check_codes(codes, -half, half - 1)
    return codes.to(torch.int32) + half


def from_offset_binary(codes: Tensor, bits: int) -> Tensor:
    """Undo `offset_binary`; returns int8."""
    return (codes.to(torch.int32) - (1 << (bits - 1))).to(torch.int8)


# --- two codes per byte ---------------------------------------------------------------------------


def pack_nibbles(codes: Tensor, *, axis: int = -1) -> Tensor:
    """Pack pairs of 4-bit codes into bytes, the even index in the low nibble.

    Along the last axis: e2m1 codes of nvfp4 and mxfp4, ``(out, in) -> (out, in / 2)``, in
    checkpoints of ModelOpt and compressed-tensors. Along ``axis=-2``: int4 codes of ModelOpt's
    INT4_AWQ, ``(out, in) -> (out / 2, in)``, in two's complement.

    Args:
        codes: Signed integers from -8 to 7, or unsigned ones from 0 to 15.
        axis: The axis that is halved, rounded up.

    Returns:
        uint8.

    Raises:
        NumericsError: A code does not fit into a nibble.
    """
    signed = codes.dtype.is_signed
    check_codes(codes, -8 if signed else 0, 7 if signed else 15)
    nibbles = _padded(codes.movedim(axis, -1), 2).to(torch.uint8).contiguous() & 0xF
    pairs = nibbles.flatten().view(torch.int16)  # little-endian; strided bytes are slow
    packed = (pairs | pairs >> 4).to(torch.uint8)
    packed = packed.view(*nibbles.shape[:-1], nibbles.shape[-1] // 2)
    return packed.movedim(-1, axis).contiguous()


def unpack_nibbles(packed: Tensor, length: int, *, axis: int = -1, signed: bool = False) -> Tensor:
    """Undo `pack_nibbles`.

    Args:
        packed: uint8.
        length: Extent of ``axis`` before packing.
        axis: The axis that was packed.
        signed: Whether codes are in two's complement.

    Returns:
        uint8 from 0 to 15, or int8 from -8 to 7.

    Raises:
        NumericsError: ``length`` does not fit.
    """
    _check_length(packed.shape[axis], length, -(-length // 2))
    wide = packed.movedim(axis, -1)
    codes = torch.stack([wide & 0xF, wide >> 4], dim=-1).flatten(-2)[..., :length]
    if signed:
        codes = (codes ^ 8).to(torch.int8) - 8  # extends the sign bit of the nibble
    return codes.movedim(-1, axis).contiguous()


# --- dense bit strings in 32-bit words ------------------------------------------------------------


def pack_bits(codes: Tensor, bits: int, *, axis: int = -1) -> Tensor:
    """Pack unsigned codes into one dense bit string per row: code ``i`` at bit ``i * bits``.

    Words are filled from their lowest bit, and codes of 3, 5, 6, 7 bits straddle two words. So
    compressed-tensors holds weights (``weight_packed``) along the last axis, and their zero points
    along ``axis=-2``, both with `offset_binary`.

    Args:
        codes: Integers from 0 to ``2^bits - 1``.
        bits: 2 to 8.
        axis: The axis that is packed.

    Returns:
        int32, ``ceil(n * bits / 32)`` words along ``axis``.

    Raises:
        NumericsError: A code does not fit.
    """
    check_codes(codes, 0, (1 << bits) - 1)
    length = codes.shape[axis]
    # 32 codes fill ``bits`` words exactly.
    groups = torch.unflatten(_padded(codes.movedim(axis, -1), WORD), -1, (-1, WORD)).to(torch.int32)
    words = torch.zeros(*groups.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for place in range(WORD):
        code, (word, shift) = groups[..., place], divmod(place * bits, WORD)
        words[..., word] |= code << shift
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    packed = words.flatten(-2)[..., : -(-length * bits // WORD)]
    return packed.movedim(-1, axis).contiguous()


def unpack_bits(packed: Tensor, bits: int, length: int, *, axis: int = -1) -> Tensor:
    """Undo `pack_bits`; returns uint8.

    Raises:
        NumericsError: ``length`` does not fit.
    """
    _check_length(packed.shape[axis], length, -(-length * bits // WORD))
    words = torch.unflatten(_padded(packed.movedim(axis, -1), bits), -1, (-1, bits))
    codes = torch.empty(*words.shape[:-1], WORD, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = words[..., word] >> shift  # of a negative word the sign comes along, cut off below
        if shift + bits > WORD:
            kept = WORD - shift
            code = (code & ((1 << kept) - 1)) | (words[..., word + 1] << kept)
        codes[..., place] = code & mask
    return codes.flatten(-2)[..., :length].movedim(-1, axis).contiguous()


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Pack a weight as GPTQ's ``qweight``: ``(out, in)`` unsigned codes, bit strings along ``in``.

    Returns:
        int32 ``(ceil(in * bits / 32), out)``. Zero points, ``(in / group, out)``, are packed by
        `pack_bits` along the last axis; version 1 stores them minus 1.

    Raises:
        NumericsError: A code does not fit.
    """
    return pack_bits(codes.mT, bits, axis=-2)


def unpack_gptq(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo `pack_gptq`: return uint8 ``(out, length)``."""
    return unpack_bits(packed, bits, length, axis=-2).mT.contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """Pack unsigned 4-bit codes as AutoAWQ's ``qweight`` and ``qzeros``, along the last axis.

    Args:
        codes: ``(in, out)`` from 0 to 15, ``out`` a multiple of 8. The nibble ``j`` of word ``c``
            holds column ``8 * c + (0, 2, 4, 6, 1, 3, 5, 7)[j]``.

    Returns:
        int32 ``(in, out / 8)``.

    Raises:
        NumericsError: A code does not fit, or ``out`` is no multiple of 8.
    """
    if codes.shape[-1] % len(AWQ_ORDER):
        raise NumericsError(
            f"AWQ packs multiples of 8 columns, not {codes.shape[-1]}",
            hint="leave this layer as it is, or use another format",
        )
    ordered = torch.unflatten(codes, -1, (-1, len(AWQ_ORDER)))[..., list(AWQ_ORDER)]
    return pack_bits(ordered.flatten(-2), 4)


def unpack_awq(packed: Tensor) -> Tensor:
    """Undo `pack_awq`; returns uint8."""
    length = packed.shape[-1] * len(AWQ_ORDER)
    ordered = torch.unflatten(unpack_bits(packed, 4, length), -1, (-1, len(AWQ_ORDER)))
    places = [AWQ_ORDER.index(column) for column in range(len(AWQ_ORDER))]
    return ordered[..., places].flatten(-2)


# --- helpers --------------------------------------------------------------------------------------


def _padded(codes: Tensor, multiple: int) -> Tensor:
    missing = -codes.shape[-1] % multiple
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes


def _check_length(found: int, length: int, expected: int) -> None:
    if found != expected:
        raise NumericsError(
            f"{length} codes are packed into {expected}, not {found}",
            hint="give the number of codes before packing",
        )
