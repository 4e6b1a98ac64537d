"""Microscaling formats: blocks under a scale that is a power of two (OCP MX 1.0).

The exponents follow numerics.md: rounded up, so that no element saturates. OCP's own rule, rounded
down from the largest power of two of the elements, is ``scale_rounding="floor"``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.codec import LARGEST, Codec, Scales, quotient
from bittern.numerics.floats import GridCodec
from bittern.numerics.grids import BIAS, GRIDS, MANTISSA, FloatGrid
from bittern.numerics.integers import IntCodec

__all__ = ["MXFloatCodec", "MXIntCodec", "exponent_ceil", "exponent_floor", "power_of_two"]

ROUNDINGS = ("ceil", "floor", "mse")
LOWEST, HIGHEST = -127, 127  # what a stored byte can say; 255 is NaN
INTEGERS = IntCodec(8, narrow=True)


def exponent_floor(values: Tensor) -> Tensor:
    """Return ``floor(log2(v))`` of positive float32 numbers, -127 for subnormal ones, int32."""
    exponent: Tensor = values.view(torch.int32) >> MANTISSA
    return exponent - BIAS


def exponent_ceil(values: Tensor) -> Tensor:
    """Return ``ceil(log2(v))`` of positive float32 numbers, not less than -127, int32.

    Read off the bits: an exact power of two is not bumped, as it may be by a float logarithm.
    """
    bits = values.view(torch.int32)
    exponent = bits >> MANTISSA
    mantissa = bits & (2**MANTISSA - 1)
    # Subnormal numbers have exponent field 0: up to 2^-127, half of the smallest normal, -127.
    power = (exponent == 0).to(torch.int32) << (MANTISSA - 1)
    bumped: Tensor = mantissa > power
    return exponent - BIAS + bumped.to(torch.int32)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2^e`` as float32, exactly, for int32 from -127 (a subnormal number) to 127."""
    bits = (exponent + BIAS) << MANTISSA
    return torch.where(exponent == LOWEST, 2 ** (MANTISSA - 1), bits).view(torch.float32)


class _PowerOfTwo(Codec):
    """The scale rule of all MX formats, for any elements.

    Attributes:
        scale_rounding: ``"ceil"``: ``e = ceil(log2(amax / max_value))``; ``"floor"``: ``e =
            floor(log2(amax)) - floor(log2(max_value))``, the rule of OCP MX 1.0, section 6.3, with
            which large elements saturate; ``"mse"``: per block the one with the smaller squared
            error, ceil on a tie.
    """

    overshoots = True
    scale_rounding: str

    def __post_init__(self) -> None:
        if self.scale_rounding not in ROUNDINGS:
            raise NumericsError(
                f"there is no scale_rounding {self.scale_rounding!r}",
                hint=f"known are {', '.join(ROUNDINGS)}",
            )

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """Whether a block chooses between two exponents."""
        return self.scale_rounding == "mse"

    def scales(self, amax: Tensor, global_scale: Tensor | None = None) -> Scales:
        """Return ``2^e``, with ``e`` from -127 to 127, and 0 where ``amax`` is 0."""
        return Scales(self._floor(amax) if self.scale_rounding == "floor" else self._ceil(amax))

    def other_scale(self, amax: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """Return the scale of OCP's rule."""
        return self._floor(amax)

    def _ceil(self, amax: Tensor) -> Tensor:
        amax = amax.float()
        return _scale(amax, exponent_ceil(quotient(amax, self.max_value)))

    def _floor(self, amax: Tensor) -> Tensor:
        amax = amax.float()
        largest = math.frexp(self.max_value)[1] - 1  # floor(log2(max_value))
        return _scale(amax, exponent_floor(amax) - largest)


def _scale(amax: Tensor, exponent: Tensor) -> Tensor:
    scale = power_of_two(exponent.clamp(LOWEST, HIGHEST))
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return torch.where(amax <= LARGEST, scale, amax)  # NaN and Inf stay


@dataclass(frozen=True)
class MXFloatCodec(_PowerOfTwo, GridCodec):
    """MXFP8, MXFP6, MXFP4: small floats under a power of two.

    Args:
        element: ``"e4m3"``, ``"e5m2"``, ``"e3m2"``, ``"e2m3"`` or ``"e2m1"``.
        scale_rounding: ``"ceil"``, ``"floor"`` or ``"mse"``.
    """

    element: str = "e4m3"
    scale_rounding: str = "ceil"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.element not in GRIDS:
            raise NumericsError(
                f"there are no elements {self.element!r}", hint=f"known are {', '.join(GRIDS)}"
            )

    @property
    def grid(self) -> FloatGrid:
        """The numbers of the elements."""
        return GRIDS[self.element]


@dataclass(frozen=True)
class MXIntCodec(_PowerOfTwo):
    """MXINT8: integers from -127 to 127 under a power of two.

    OCP MX 1.0 counts an element in steps of 2^-6, so that the exponent it stores is larger by 6
    for the same numbers.

    Args:
        scale_rounding: ``"ceil"``, ``"floor"`` or ``"mse"``.
    """

    scale_rounding: str = "ceil"

    storage = torch.int8

    @property
    def max_value(self) -> float:  # type: ignore[override]
        """127."""
        return INTEGERS.max_value

    def round_(self, values: Tensor) -> Tensor:
        """Clamp and round to integers."""
        return INTEGERS.round_(values)

    def store(self, values: Tensor) -> Tensor:
        """Return the integers in int8."""
        return INTEGERS.store(values)

    def load(self, codes: Tensor) -> Tensor:
        """Return the integers as float32."""
        return INTEGERS.load(codes)
