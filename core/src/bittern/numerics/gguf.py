"""Blocks of GGUF files: 32 elements along the last axis, with their scale in front.

Layouts of ggml's ``block_q8_0``, ``block_q4_0``, ``block_mxfp4``. In 4-bit blocks element ``k`` is
the low nibble of byte ``k`` and element ``k + 16`` the high one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.packing import check_codes

__all__ = [
    "BLOCK",
    "pack_mxfp4",
    "pack_q4_0",
    "pack_q8_0",
    "unpack_mxfp4",
    "unpack_q4_0",
    "unpack_q8_0",
]

BLOCK = 32


def pack_q8_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Pack int8 codes: per block a float16 scale and 32 bytes; the value is ``code * scale``.

    Args:
        codes: ``(..., n)`` from -128 to 127, ``n`` a multiple of 32.
        scales: ``(..., n / 32)``, exact float16 numbers.

    Returns:
        uint8 ``(..., n / 32 * 34)``.

    Raises:
        NumericsError: Codes, scales or shapes do not fit.
    """
    check_codes(codes, -128, 127)
    return _joined(_half(scales), _blocks(codes, scales).to(torch.int8).view(torch.uint8))


def unpack_q8_0(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, int8, and the scales, float16."""
    scales, codes = _parted(packed, 2, BLOCK)
    return codes.view(torch.int8).flatten(-2), scales.view(torch.float16).squeeze(-1)


def pack_q4_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Pack signed 4-bit codes: per block a float16 scale and 16 bytes, codes plus 8.

    Args:
        codes: ``(..., n)`` from -8 to 7, ``n`` a multiple of 32.
        scales: ``(..., n / 32)``, exact float16 numbers.

    Returns:
        uint8 ``(..., n / 32 * 18)``.

    Raises:
        NumericsError: Codes, scales or shapes do not fit.
    """
    check_codes(codes, -8, 7)
    return _joined(_half(scales), _halves(_blocks(codes, scales).to(torch.int8) + 8))


def unpack_q4_0(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, int8, and the scales, float16."""
    scales, codes = _parted(packed, 2, BLOCK // 2)
    return _whole(codes).to(torch.int8) - 8, scales.view(torch.float16).squeeze(-1)


def pack_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Pack e2m1 codes: per block an e8m0 byte and 16 bytes.

    Args:
        codes: ``(..., n)`` from 0 to 15, ``n`` a multiple of 32.
        scales: ``(..., n / 32)`` bytes of `bittern.numerics.stored.e8m0_bytes`.

    Returns:
        uint8 ``(..., n / 32 * 17)``.

    Raises:
        NumericsError: Codes, scales or shapes do not fit.
    """
    check_codes(codes, 0, 15)
    check_codes(scales, 0, 255)
    return _joined(scales.to(torch.uint8).unsqueeze(-1), _halves(_blocks(codes, scales)))


def unpack_mxfp4(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and the e8m0 bytes, both uint8."""
    scales, codes = _parted(packed, 1, BLOCK // 2)
    return _whole(codes), scales.squeeze(-1)


def _half(scales: Tensor) -> Tensor:
    halves = scales.to(torch.float16)
    if not bool((halves.to(scales.dtype) == scales).all()):
        raise NumericsError(
            "scales of GGUF blocks are float16, and a scale is no float16 number",
            hint="round the scales before quantizing, so that the codes fit them",
        )
    return halves.unsqueeze(-1).view(torch.uint8)


def _blocks(codes: Tensor, scales: Tensor) -> Tensor:
    size = codes.shape[-1]
    if size % BLOCK or scales.shape != (*codes.shape[:-1], size // BLOCK):
        raise NumericsError(
            f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} are no blocks of {BLOCK}",
            hint=f"the last axis must be a multiple of {BLOCK}, with one scale per block",
        )
    return torch.unflatten(codes, -1, (-1, BLOCK))


def _halves(blocks: Tensor) -> Tensor:
    low, high = blocks.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def _whole(packed: Tensor) -> Tensor:
    return torch.cat([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def _joined(scales: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([scales, codes], dim=-1).flatten(-2)


def _parted(packed: Tensor, head: int, body: int) -> tuple[Tensor, Tensor]:
    if packed.shape[-1] % (head + body):
        raise NumericsError(
            f"{packed.shape[-1]} bytes are no blocks of {head + body}", hint="check the type"
        )
    blocks = torch.unflatten(packed, -1, (-1, head + body))
    return blocks[..., :head].contiguous(), blocks[..., head:].contiguous()
