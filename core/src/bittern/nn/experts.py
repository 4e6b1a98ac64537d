"""Which rows of an activation belong to which expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Experts"]


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
