"""Ties widths together, or finds that they cannot be tied, and says why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor

from bittern.tracing.symbolic.symbols import Layout, Symbol
from bittern.tracing.symbolic.values import Axis

__all__ = ["Linker", "index_map", "match_dims"]


class Linker:
    """Ties symbols; of several, the one with the highest priority leads, then the first."""

    def __init__(self) -> None:
        self._order: dict[Symbol, int] = {}

    def enter(self, symbol: Symbol) -> None:
        """Note that the symbol's module runs now, if it has not run before."""
        self._order.setdefault(symbol, len(self._order))

    def block(self, axes: Iterable[Axis], reason: str) -> None:
        """Make widths constant."""
        for axis in axes:
            for leaf in axis.leaves:
                leaf.disable(reason)

    def join(self, axes: Sequence[Axis], where: str) -> bool:
        """Tie widths that must be equal; if that is not possible they become constant.

        Returns:
            Whether they are tied.
        """
        first = axes[0]
        problems = [problem for other in axes[1:] if (problem := self._join(first, other))]
        if problems:
            self.block(axes, f"{where}: {problems[0]}")
        return not problems

    def follow(self, symbol: Symbol, axis: Axis, where: str) -> bool:
        """Let an incoming symbol follow the width that it reads.

        Returns:
            Whether it does; if not, both are constant.
        """
        problem = self._follow(symbol, axis)
        if problem:
            self.block([axis, Axis((symbol,))], f"{where}: {problem}")
        return not problem

    def _follow(self, symbol: Symbol, axis: Axis) -> str:
        layout, width = axis.layout, axis.width
        if layout is not None:
            if not symbol.size or not width or symbol.size % width:
                return f"{symbol.size} features do not divide into {width} channels"
            factor = symbol.size // width
            if layout.factor not in (0, factor):
                return f"{symbol.size} features meet {width} x {layout.factor}"
            layout = Layout(layout.kind, factor) if factor > 1 else None
        elif None not in (symbol.size, width) and symbol.size != width:
            return f"{symbol.size} features meet {width}"
        if not symbol.is_free:
            if symbol.layout != layout:
                return "is used with differently arranged inputs"
            return self._join(Axis((symbol,)), Axis(axis.leaves))
        if len(axis.leaves) == 1:
            symbol.link_to(axis.leaves[0])
        else:
            symbol.concatenate(axis.leaves)
        symbol.layout = layout
        return ""

    def _join(self, one: Axis, other: Axis) -> str:
        """Tie two; return what is in the way."""
        if one.layout != other.layout:
            return "differently arranged channels meet"
        left, right = one.leaves, other.leaves
        if left == right:
            return ""
        if len(left) == 1 and len(right) == 1:
            return self._tie(left[0], right[0])
        if len(left) == 1:
            return self._concatenate(left[0], other)
        if len(right) == 1:
            return self._concatenate(right[0], one)
        if [leaf.size for leaf in left] != [leaf.size for leaf in right]:
            return "differently concatenated channels meet"
        problems = [self._tie(a, b) for a, b in zip(left, right, strict=True)]
        return next(filter(None, problems), "")

    def _tie(self, one: Symbol, other: Symbol) -> str:
        one, other = one.root, other.root
        if one is other:
            return ""
        if None not in (one.size, other.size) and one.size != other.size:
            return f"{one.size} channels meet {other.size}"
        if one.is_constant or other.is_constant:
            reason = one.reason or other.reason
            one.disable(reason)
            other.disable(reason)
            return ""
        leader = max(one, other, key=self._rank)
        (other if leader is one else one).link_to(leader)
        return ""

    def _concatenate(self, one: Symbol, parts: Axis) -> str:
        if one in parts.leaves:
            return "a concatenation meets one of its parts"
        if None not in (one.size, parts.width) and one.size != parts.width:
            return f"{one.size} channels meet {parts.width}"
        if one.is_constant:
            self.block([parts], one.reason)
        else:
            one.concatenate(parts.leaves)
        return ""

    def _rank(self, symbol: Symbol) -> tuple[bool, int, int]:
        order = self._order.get(symbol, len(self._order))
        return symbol.is_declared_searchable, symbol.priority, -order


def match_dims(left: Sequence[Iterable[int]], right: Sequence[Iterable[int]]) -> dict[int, int]:
    """Pair up two lists of dimensions, each given by the set of its names.

    Args:
        left: Dimensions.
        right: Dimensions.

    Returns:
        Index on the left to index on the right, such that all are paired and the names of a pair
        overlap; empty if there is no such pairing. Of several, the first.
    """
    if len(left) != len(right):
        return {}
    sets = [set(names) for names in left], [set(names) for names in right]
    overlap = [[bool(a & b) for b in sets[1]] for a in sets[0]]
    if not all(map(any, overlap)):
        return {}
    for order in permutations(range(len(right))):
        if all(overlap[i][j] for i, j in enumerate(order)):
            return dict(enumerate(order))
    return {}


def index_map(symbol: Symbol) -> Mapping[Symbol, Tensor]:
    """Return which positions of a symbol's dimension belong to which coordinate of its roots.

    Args:
        symbol: A symbol of known size.

    Returns:
        Every symbol that decides its width, to ``(size, k)``: coordinate ``i`` of it is at the
        positions ``[i]``.
    """
    width = sum(leaf.size or 0 for leaf in symbol.leaves)
    layout = symbol.layout or Layout("inner", 1)
    positions = torch.arange(width * layout.factor)
    if layout.kind == "inner":
        positions = positions.view(width, layout.factor)
    else:
        positions = positions.view(layout.factor, width).T
    found: dict[Symbol, list[Tensor]] = {}
    start = 0
    for leaf in symbol.leaves:
        stop = start + (leaf.size or 0)
        found.setdefault(leaf, []).append(positions[start:stop])
        start = stop
    return {leaf: torch.cat(pieces, dim=1) for leaf, pieces in found.items()}
