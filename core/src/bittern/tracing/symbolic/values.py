"""What is known about a value of the graph: a shape, some of whose dimensions are widths of layers.

Without example inputs most sizes are unknown, and often the number of dimensions too. What is
known is kept by position; what is not is a token, equal only to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bittern.tracing.symbolic.symbols import Layout, Symbol

__all__ = [
    "Axis",
    "Dim",
    "Extent",
    "Pieces",
    "Shape",
    "Sizes",
    "Token",
    "axes_of",
    "rank_of",
    "values_of",
]


@dataclass(frozen=True)
class Token:
    """A dimension about which nothing is known: where it was first seen."""

    source: str
    position: int


@dataclass(frozen=True)
class Axis:
    """A dimension that is the width of one layer, or of several, one after the other.

    Attributes:
        parts: Symbols, in order.
        layout: How their coordinates lie in it, if not one to one; factor 0 if not known yet.
    """

    parts: tuple[Symbol, ...]
    layout: Layout | None = None

    @property
    def leaves(self) -> tuple[Symbol, ...]:
        """The symbols that decide the width."""
        return tuple(leaf for part in self.parts for leaf in part.leaves)

    @property
    def width(self) -> int | None:
        """The number of coordinates, if all sizes are known."""
        sizes = [leaf.size for leaf in self.leaves]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def same(self, other: object) -> bool:
        """Return whether ``other`` is the same width, laid out in the same way."""
        return (
            isinstance(other, Axis) and self.layout == other.layout and self.leaves == other.leaves
        )


Dim = int | Token | Axis


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor.

    Attributes:
        source: The node it comes from.
        rank: Number of dimensions, if known.
        dims: What is known, by position; counted from the front if the rank is known, and else
            from the end it is known from.
        origin: What it is, for reasons ("the model's input `x`").
        loose: Widths that it has somewhere.
    """

    source: str
    rank: int | None = None
    dims: Mapping[int, Dim] = field(default_factory=dict)
    origin: str = ""
    loose: tuple[Axis, ...] = ()

    def index(self, dim: int) -> int:
        """Return the position of ``dim``, from the front if the rank is known."""
        return dim + self.rank if dim < 0 and self.rank is not None else dim

    def at(self, dim: int) -> Dim:
        """Return what is known about a dimension."""
        position = self.index(dim)
        found = self.dims.get(position)
        return Token(self.source, position) if found is None else found

    def every(self) -> list[Dim]:
        """Return all dimensions of a shape of known rank."""
        assert self.rank is not None
        return [self.at(position) for position in range(self.rank)]

    @property
    def axes(self) -> list[tuple[int, Axis]]:
        """The dimensions that are widths, with their positions."""
        return [(p, dim) for p, dim in self.dims.items() if isinstance(dim, Axis)]

    def aliases(self, position: int) -> set[int]:
        """Return the ways to name the dimension at ``position``."""
        return {position} if self.rank is None else {position, position - self.rank}

    def but(self, source: str, dims: Mapping[int, Dim], *, rank: int | None = None) -> Shape:
        """Return a shape with other dimensions."""
        return Shape(source, self.rank if rank is None else rank, dims, self.origin)


@dataclass(frozen=True)
class Sizes:
    """All sizes of a tensor: ``x.shape``."""

    shape: Shape


@dataclass(frozen=True)
class Extent:
    """One size of a tensor: ``x.shape[0]``."""

    dim: Dim


@dataclass(frozen=True)
class Pieces:
    """Equal tensors, it is not known how many: ``x.chunk(2, dim=2)``."""

    piece: Shape


def values_of(value: Any) -> Iterator[Any]:
    """Yield the known values in nested tuples, lists and dictionaries."""
    if isinstance(value, Shape | Sizes | Extent):
        yield value
    elif isinstance(value, Pieces):
        yield value.piece
    elif isinstance(value, tuple | list):
        for item in value:
            yield from values_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from values_of(item)
    elif isinstance(value, slice):
        yield from values_of((value.start, value.stop, value.step))


def axes_of(value: Any) -> list[Axis]:
    """Return every width in a nested value."""
    found: list[Axis] = []
    for item in values_of(value):
        if isinstance(item, Extent):
            found.extend([item.dim] if isinstance(item.dim, Axis) else [])
        else:
            shape = item.shape if isinstance(item, Sizes) else item
            found.extend(axis for _, axis in shape.axes)
            found.extend(shape.loose)
    return found


def rank_of(dims: frozenset[int]) -> int | None:
    """Return the rank that the names of one dimension imply: ``{1, -3}`` is one of four."""
    front = [dim for dim in dims if dim >= 0]
    back = [dim for dim in dims if dim < 0]
    return front[0] - back[0] if len(front) == len(back) == 1 else None
