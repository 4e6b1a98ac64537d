"""Grids of small floats: which numbers they hold, rounding to them, and their bits.

Rounding is arithmetic, because torch's float8 casts are scalar code on CPUs, and because torch has
no dtype for most of these grids. For ``v`` with ``2^e <= |v| < 2^(e+1)`` a grid with ``m`` mantissa
bits has the step ``q = 2^(max(e, emin) - m)``. Adding ``c = 1.5 * 2^23 * q`` to ``v`` rounds it to
a multiple of ``q``, ties to even: floats near ``c`` are ``q`` apart, and ``c`` is an even multiple
of ``q``. Subtracting ``c`` is exact, and turns -0 into +0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import NumericsError

__all__ = ["E2M1", "E2M3", "E3M2", "E4M3", "E5M2", "GRIDS", "FloatGrid"]

# Layout of a float32.
MANTISSA = 23
BIAS = 127
EXPONENT = 0x7F800000


@dataclass(frozen=True)
class FloatGrid:
    """The finite numbers of a float of a sign, ``exponent`` and ``mantissa`` bits.

    Attributes:
        exponent: Exponent bits; the bias is ``2^(exponent-1) - 1``.
        mantissa: Mantissa bits.
        max_value: Largest finite number.
        dtype: The torch dtype with these numbers; ``None``: a code is kept in one uint8, as the
            bits ``sign | exponent | mantissa``, from the lowest bit.
    """

    exponent: int
    mantissa: int
    max_value: float
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def storage(self) -> torch.dtype:
        """Dtype of a code."""
        return self.dtype if self.dtype is not None else torch.uint8

    @property
    def lowest_exponent(self) -> int:
        """The ``e`` of the smallest normal number, ``2^e``."""
        return 2 - (1 << (self.exponent - 1))

    def round_(self, values: Tensor) -> Tensor:
        """Clamp and round to the grid, ties to even, in place (float32); NaN stays NaN."""
        values.clamp_(-self.max_value, self.max_value)
        bits = values.detach().view(torch.int32)
        power = (bits & EXPONENT).view(torch.float32).clamp_min_(2.0**self.lowest_exponent)
        carry = power.mul_(1.5 * 2.0 ** (MANTISSA - self.mantissa))  # exact
        return values.add_(carry).sub_(carry)

    def encode(self, values: Tensor) -> Tensor:
        """Return grid values (float32) as codes of ``storage``."""
        bits = values.view(torch.int32)
        magnitude = values.abs()
        # A subnormal number is a multiple of the smallest one. A normal one has the bits of its
        # float32, cut off below and with another bias.
        lowest = self.lowest_exponent
        small = (magnitude * 2.0 ** (self.mantissa - lowest)).to(torch.int32)
        shifted = magnitude.view(torch.int32) >> (MANTISSA - self.mantissa)
        normal = shifted - ((BIAS + lowest - 1) << self.mantissa)
        code = torch.where(magnitude < 2.0**lowest, small, normal)
        sign = (bits >> 31 & 1) << (self.bits - 1)
        packed = (code | sign).to(torch.uint8)
        return packed if self.dtype is None else packed.view(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Return codes as float32, bit for bit what they stand for.

        Raises:
            NumericsError: The codes are not kept in ``storage``.
        """
        if codes.dtype != self.storage:
            raise NumericsError(
                f"codes of {self} are kept in {self.storage}, not in {codes.dtype}",
                hint="view bytes as the dtype that stores them",
            )
        if self.dtype is not None:
            return codes.float()  # knows NaN and Inf, too
        code = codes.to(torch.int32)
        magnitude = code & (2 ** (self.bits - 1) - 1)
        lowest = self.lowest_exponent
        rebased = (magnitude + ((BIAS + lowest - 1) << self.mantissa)) << (MANTISSA - self.mantissa)
        small = magnitude.float() * 2.0 ** (lowest - self.mantissa)
        values = torch.where(magnitude < 2**self.mantissa, small, rebased.view(torch.float32))
        return torch.where((code >> (self.bits - 1) & 1) == 1, -values, values)

    def __str__(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"


# OCP 8-bit Floating Point Specification 1.0, section 5; OCP Microscaling Formats 1.0, section 5.3.
E4M3 = FloatGrid(4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = FloatGrid(5, 2, 57344.0, torch.float8_e5m2)
E3M2 = FloatGrid(3, 2, 28.0)
E2M3 = FloatGrid(2, 3, 7.5)
E2M1 = FloatGrid(2, 1, 6.0)

GRIDS = {str(grid): grid for grid in (E4M3, E5M2, E3M2, E2M3, E2M1)}
