"""Which rows of an activation belong to which expert, and their scales."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bittern.numerics import Scales

__all__ = ["Experts", "per_row", "scales_per_row"]


@dataclass(frozen=True)
class Experts:
    """The experts that the rows of an activation belong to.

    A stacked activation quantizer keeps one range per expert, and quantizes the rows of all of
    them at once.

    Attributes:
        index: The expert of every row, int64, shape ``(rows,)``.
        count: How many experts there are.
    """

    index: Tensor
    count: int


def per_row(values: Tensor, experts: Experts, x: Tensor) -> Tensor:
    """Return the value of every row's expert, shape ``(rows, .., 1)``; one value serves all.

    Args:
        values: One per expert, ``(experts,)``, or one for all, ``()``.
        experts: Which rows belong to which expert.
        x: The activation, ``(rows, ..)``.
    """
    if values.dim():
        values = values[experts.index].reshape(-1, *([1] * (x.dim() - 1)))
    return values.expand(*x.shape[:-1], 1)


def scales_per_row(scales: Scales, experts: Experts, x: Tensor) -> Scales:
    """Return the scales of every row of ``x``, of scales per expert."""
    zero = scales.zero_point
    return Scales(
        per_row(scales.scale, experts, x), None if zero is None else per_row(zero, experts, x)
    )
