"""Scales as the bytes that files hold: e8m0 of the MX formats, e4m3 of nvfp4."""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.grids import BIAS, E4M3
from bittern.numerics.mx import exponent_ceil, power_of_two

__all__ = ["e4m3_scales", "e8m0_bytes", "e8m0_scales"]


def e8m0_bytes(scales: Tensor) -> Tensor:
    """Return the exponents of powers of two, plus 127, as uint8 (OCP MX 1.0, section 5.4.1).

    Args:
        scales: Float32 powers of two from 2^-127 to 2^127.

    Raises:
        NumericsError: One of them is something else.
    """
    bytes_ = exponent_ceil(scales) + BIAS
    if not bool((power_of_two(bytes_.clamp(0, 2 * BIAS) - BIAS) == scales).all()):
        raise NumericsError(
            "e8m0 holds powers of two from 2^-127 to 2^127, and a scale is something else",
            hint="take the scales of an MX format",
        )
    return bytes_.to(torch.uint8)


def e8m0_scales(bytes_: Tensor) -> Tensor:
    """Return ``2^(byte - 127)`` as float32; NaN for 255."""
    wide = bytes_.to(torch.int32)
    return torch.where(wide == 255, torch.nan, power_of_two(wide.clamp_max(254) - BIAS))


def e4m3_scales(scales: Tensor) -> Tensor:
    """Return block scales of nvfp4 in float8_e4m3fn.

    Args:
        scales: Float32, exact e4m3 numbers: ``Scales.scale``, not ``Scales.step``.

    Raises:
        NumericsError: One of them is no e4m3 number.
    """
    if not bool((E4M3.round_(scales.clone()) == scales).all()):
        raise NumericsError(
            "a block scale is no e4m3 number",
            hint="take Scales.scale of an nvfp4 tensor; the global scale is stored apart",
        )
    return E4M3.encode(scales)
