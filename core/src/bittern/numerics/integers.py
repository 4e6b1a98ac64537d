"""Integer grids: symmetric, narrow, unsigned, and asymmetric with a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.codec import LARGEST, SMALLEST, Codec, Scales, linear_scale, quotient

__all__ = ["IntCodec"]


@dataclass(frozen=True)
class IntCodec(Codec):
    """Integers ``[-2^(b-1), 2^(b-1)-1]``, scale ``amax / (2^(b-1)-1)`` (design: numerics.md).

    Args:
        bits: Bits of a code, 2 to 8.
        narrow: Leave out the lowest code, so that the range is symmetric.
        unsigned: Integers ``[0, 2^b-1]``, scale ``amax / (2^b-1)``, for data that is never
            negative.
        asymmetric: Scale and zero point from both ends of the range (see `scales_between`).
    """

    bits: int
    narrow: bool = False
    unsigned: bool = False
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise NumericsError(f"integers have 2 to 8 bits, not {self.bits}")
        for name in ("narrow", "unsigned", "asymmetric"):
            if not isinstance(value := getattr(self, name), bool):
                raise NumericsError(  # the text "no" would count as true
                    f"{name} is {value!r}", hint="write true or false, without quotes"
                )
        if self.unsigned and (self.narrow or self.asymmetric):
            raise NumericsError(
                "unsigned integers are neither narrow nor asymmetric",
                hint="give one of narrow, unsigned, asymmetric; narrow and asymmetric may go along",
            )

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """Whether there are negative codes."""
        return not self.unsigned

    @property
    def overshoots(self) -> bool:  # type: ignore[override]
        """Both ends are rounded to steps, away from 0 in half of the cases."""
        return self.asymmetric

    @property
    def max_value(self) -> float:  # type: ignore[override]
        """Largest code."""
        return float(2**self.bits - 1 if self.unsigned else 2 ** (self.bits - 1) - 1)

    @property
    def min_value(self) -> float:
        """Smallest code."""
        if self.unsigned:
            return 0.0
        return -self.max_value if self.narrow else -self.max_value - 1

    @property
    def storage(self) -> torch.dtype:  # type: ignore[override]
        """Codes are one per element, int8 or uint8, whatever their bits."""
        return torch.uint8 if self.unsigned else torch.int8

    def scales(self, amax: Tensor, global_scale: Tensor | None = None) -> Scales:
        """Return ``amax / max_value``."""
        return Scales(linear_scale(amax, self.max_value))

    def scales_between(self, low: Tensor, high: Tensor) -> Scales:
        """Return ``s = (high - low) / (steps)`` and ``z = round(min - low / s)``, within the codes.

        The rule of ONNX DynamicQuantizeLinear; since ``low <= 0 <= high``, 0 is a grid value.
        """
        steps = self.max_value - self.min_value
        low, high = low.float(), high.float()
        width = high - low
        apart = quotient(high, steps) - quotient(low, steps)  # where the width overflows
        scale = torch.where(width <= LARGEST, quotient(width, steps), apart)
        scale = scale.clamp_min(SMALLEST)
        scale = torch.where(width == 0, torch.ones_like(scale), scale)
        zero = (self.min_value - low / scale).round().clamp(self.min_value, self.max_value)
        return Scales(scale, zero_point=zero)

    def round_(self, values: Tensor) -> Tensor:
        """Clamp and round to integers; adding 0 turns -0 into +0."""
        return values.clamp_(self.min_value, self.max_value).round_().add_(0.0)

    def store(self, values: Tensor) -> Tensor:
        """Return the integers in ``storage``."""
        return values.to(self.storage)

    def load(self, codes: Tensor) -> Tensor:
        """Return the integers as float32."""
        return codes.float()
