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

    @property
    def _sign(self) -> int:
        """The sign bit of a code."""
        return 1 << (self.bits - 1)

    @property
    def _offset(self) -> int:
        """The bits of the smallest normal number as a float32, cut off below."""
        return (BIAS + self.lowest_exponent) << self.mantissa

    def round_(self, values: Tensor) -> Tensor:
        """Clamp and round to the grid, ties to even, in place (float32); NaN stays NaN."""
        values.clamp_(-self.max_value, self.max_value)
        if self.dtype is not None and torch.compiler.is_compiling():
            # Compilers turn the cast into vector code, and the view below into a loop.
            return values.copy_(values.to(self.dtype)).add_(0.0)
        bits = values.detach().view(torch.int32)
        power = (bits & EXPONENT).view(torch.float32).clamp_min_(2.0**self.lowest_exponent)
        carry = power.mul_(1.5 * 2.0 ** (MANTISSA - self.mantissa))  # exact
        return values.add_(carry).sub_(carry)

    def encode(self, values: Tensor) -> Tensor:
        """Return grid values (float32) as codes of ``storage``."""
        if self.dtype is not None:
            return values.to(self.dtype)  # exact
        # A number is split at the smallest normal one, 2^lowest. Up to there codes are steps of
        # equal size; beyond, they are the bits of a float32 cut off below, with another bias. No
        # torch.where: branching per element, it is slower than all the rest on CPUs.
        edge, magnitude = 2.0**self.lowest_exponent, values.abs()
        beyond = magnitude.clamp_min(edge).view(torch.int32) >> (MANTISSA - self.mantissa)
        below = magnitude.clamp_max_(edge).mul_(2.0**self.mantissa / edge).to(torch.int16)
        sign = values.view(torch.int32) >> (32 - self.bits)  # the sign bit, copied downwards
        code = beyond.to(torch.int16).sub_(self._offset).add_(below)
        return code.bitwise_or_(sign.to(torch.int16).bitwise_and_(self._sign)).to(torch.uint8)

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
        edge, magnitude = 2.0**self.lowest_exponent, code & (self._sign - 1)
        beyond = magnitude.clamp_min(2**self.mantissa).add_(self._offset - 2**self.mantissa)
        values = beyond.bitwise_left_shift_(MANTISSA - self.mantissa).view(torch.float32)
        below = magnitude.clamp_max_(2**self.mantissa).float()
        values = values.add_(below, alpha=edge / 2**self.mantissa).sub_(edge)  # all exact
        return values.mul_((code >> (self.bits - 1)).mul_(-2).add_(1))

    def __str__(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"


# OCP 8-bit Floating Point Specification 1.0, section 5; OCP Microscaling Formats 1.0, section 5.3.
E4M3 = FloatGrid(4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = FloatGrid(5, 2, 57344.0, torch.float8_e5m2)
E3M2 = FloatGrid(3, 2, 28.0)
E2M3 = FloatGrid(2, 3, 7.5)
E2M1 = FloatGrid(2, 1, 6.0)

GRIDS = {str(grid): grid for grid in (E4M3, E5M2, E3M2, E2M3, E2M1)}
