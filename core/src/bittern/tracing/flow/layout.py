"""Where the coordinates of a leaf lie in a dimension."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from bittern.tracing.flow.axes import Axis, Kind

__all__ = ["Positions", "positions"]

Positions = dict[Axis, NDArray[np.int64]]


def positions(axis: Axis) -> Positions:
    """Return for every leaf of ``axis`` an array ``(leaf size, k)``.

    Row ``i`` lists the ``k`` positions in the dimension that belong to coordinate ``i`` of the
    leaf, for all ``i`` in the same order. A leaf that occurs in two factors of one product (an
    outer product of a thing with itself) has no such rows, is fixed and left out.
    """
    axis = axis.find()
    if axis.kind is Kind.LEAF:
        return {axis: np.arange(axis.size)[:, None]}
    found: Positions = {}
    if axis.kind is Kind.SUM:
        start = 0
        for part in axis.parts:
            for leaf, rows in positions(part).items():
                shifted = rows + start
                found[leaf] = np.hstack((found[leaf], shifted)) if leaf in found else shifted
            start += part.size
        return found
    factors = axis.factors()
    tangled: set[Axis] = set()
    for i, factor in enumerate(factors):
        before = np.arange(prod(f.size for f in factors[:i]))
        after = np.arange(inner := prod(f.size for f in factors[i + 1 :]))
        for leaf, rows in positions(factor).items():
            if leaf in found:
                tangled.add(leaf)
                continue
            grid = (
                before[None, :, None, None] * (factor.size * inner)
                + rows[:, None, :, None] * inner
                + after[None, None, None, :]
            )
            found[leaf] = grid.reshape(leaf.size, grid[0].size if leaf.size else 0)
    for leaf in tangled:
        leaf.fix("it meets itself in one dimension")
        del found[leaf]
    return found
