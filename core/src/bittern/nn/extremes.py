"""The statistic that max calibration keeps of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.nn.experts import Experts
from bittern.numerics import Range, amax
from bittern.numerics.layout import check_dtype, extremes
from bittern.records import Granularity, PerToken

__all__ = ["Extremes"]


@dataclass(frozen=True)
class Extremes:
    """How far the values of a tensor reach, as one tensor that is combined by its maximum.

    Attributes:
        granularity: Which elements share a range.
        both: Whether both ends are kept: ``(2, ...)``, the largest value and minus the smallest.
    """

    granularity: Granularity
    both: bool = False

    def of(self, x: Tensor, experts: Experts | None = None) -> Tensor:
        """Return the statistic of a tensor.

        Args:
            x: The tensor.
            experts: Which rows belong to which expert: one range each, and 0 for those without
                rows, shape ``(experts,)``.

        Raises:
            NumericsError: ``x`` is not a real floating tensor, or has too few dimensions.
        """
        if experts is not None:
            check_dtype(x)
            rows = x.reshape(len(experts.index), -1)
            if self.both:
                low, high = extremes(rows, PerToken())
                values = torch.stack((high.flatten(), -low.flatten()))
            else:
                values = amax(rows, PerToken()).flatten()
            found = torch.zeros(
                (*values.shape[:-1], experts.count), dtype=values.dtype, device=x.device
            )
            index = experts.index.expand(values.shape)
            return found.scatter_reduce_(-1, index, values, "amax")
        if not self.both:
            return amax(x, self.granularity)
        low, high = extremes(x, self.granularity)
        return torch.stack((high, -low))

    def range_of(self, value: Tensor) -> Range:
        """Return the range that a statistic stands for."""
        return Range(value[0], amin=-value[1]) if self.both else Range(value)

    def __str__(self) -> str:
        return str(self.granularity)
