"""Codebooks: codes that stand for the numbers of a table, nf4 of QLoRA among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.codec import Codec, Scales, linear_scale

__all__ = ["NF4", "CodebookCodec"]

# QLoRA (arXiv 2305.14314), appendix E: quantiles of the normal distribution, scaled to [-1, 1].
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class CodebookCodec(Codec):
    """The nearest number of a table, scale ``amax / max(table)``; a code is an index.

    Args:
        table: Ascending numbers, 0 among them; at most 256.
    """

    table: tuple[float, ...] = NF4
    _borders: tuple[float, ...] = field(init=False, repr=False, compare=False)

    storage = torch.uint8

    def __post_init__(self) -> None:
        numbers = torch.tensor(self.table, dtype=torch.float32).tolist()
        rising = all(a < b for a, b in pairwise(numbers))
        if not rising or 0.0 not in numbers or not 2 <= len(numbers) <= 256:
            raise NumericsError(
                "a codebook is a table of 2 to 256 ascending float32 numbers, 0 among them",
                hint="sort the table and leave out what is twice there",
            )
        object.__setattr__(self, "table", tuple(numbers))
        object.__setattr__(self, "_borders", _borders(numbers))

    @property
    def max_value(self) -> float:  # type: ignore[override]
        """Largest magnitude of the table."""
        return max(abs(self.table[0]), abs(self.table[-1]))

    @property
    def min_value(self) -> float:
        """Smallest number of the table."""
        return self.table[0]

    def scales(self, amax: Tensor, global_scale: Tensor | None = None) -> Scales:
        """Return ``amax / max_value``."""
        return Scales(linear_scale(amax, self.max_value))

    def round_(self, values: Tensor) -> Tensor:
        """Take the nearest number of the table, the one with an even index on a tie."""
        values.clamp_(self.table[0], self.table[-1])
        nearest = self.load(self._index(values))
        return values.mul_(0.0).add_(nearest)  # 0, or NaN for NaN

    def store(self, values: Tensor) -> Tensor:
        """Return the indices of numbers of the table."""
        return self._index(values).to(torch.uint8)

    def load(self, codes: Tensor) -> Tensor:
        """Return the numbers at the indices."""
        return torch.tensor(self.table, device=codes.device)[codes.int()]

    def _index(self, values: Tensor) -> Tensor:
        borders = torch.tensor(self._borders, device=values.device)
        return torch.bucketize(values.contiguous(), borders, out_int32=True)


def _borders(table: list[float]) -> tuple[float, ...]:
    """Return the largest float32 that is rounded down, between any two neighbors of a table."""
    found = []
    for index, (below, above) in enumerate(pairwise(table)):
        middle = (Fraction(below) + Fraction(above)) / 2
        nearest = torch.tensor(float(middle), dtype=torch.float32)
        odd = index % 2 == 1  # a tie goes to the even neighbor
        if Fraction(nearest.item()) > middle or (odd and Fraction(nearest.item()) == middle):
            nearest = torch.nextafter(nearest, torch.tensor(-math.inf))
        found.append(nearest.item())
    return tuple(found)
