"""Concatenation: what reads it follows several widths, each from its offset on.

No module stands in for a concatenation: its value has the producers' symbols as parts. A
concatenation of concatenations is one, the same producer may be in it twice, and in any number of
concatenations.
"""

from __future__ import annotations

from typing import Any

from bittern.tracing.symbolic.dependencies import Step
from bittern.tracing.symbolic.elementwise import broadcast
from bittern.tracing.symbolic.names import TableProcessor, operations
from bittern.tracing.symbolic.values import Axis, Dim, Pieces, Shape, Token, axes_of

__all__ = ["concat"]


def _concatenate(step: Step) -> Any:
    tensors, dim = step.argument(0, "tensors"), step.argument(1, "dim", 0)
    dim = step.kwargs.get("axis", dim)
    if isinstance(tensors, Pieces) and isinstance(dim, int):
        return _of_pieces(step, tensors.piece, dim)
    shapes = list(tensors) if isinstance(tensors, tuple | list) else []
    if not shapes or not all(isinstance(shape, Shape) for shape in shapes):
        return step.boundary()
    if not isinstance(dim, int) or any(shape.loose for shape in shapes):
        return step.boundary()
    if not any(shape.axes for shape in shapes):
        return Shape(step.node.name, origin=f"what {step.where} returns")
    ranks = {shape.rank for shape in shapes if shape.rank is not None}
    if len(ranks) > 1 or (ranks and any(shape.rank is None and shape.dims for shape in shapes)):
        return step.boundary("concatenates tensors of which one has an unknown shape")
    rank = next(iter(ranks), None)
    position = dim + rank if rank is not None and dim < 0 else dim
    pieces = [shape.dims.get(position, Token(shape.source, position)) for shape in shapes]
    unsure = rank is None and any((p < 0) != (dim < 0) for s in shapes for p, _ in s.axes)
    axes = [piece for piece in pieces if isinstance(piece, Axis)]
    if unsure or (axes and len(axes) < len(pieces)):
        return step.boundary("concatenates the width with what is no layer's")
    if any(axis.layout is not None for axis in axes):
        return step.boundary("concatenates flattened channels")
    # Along all other dimensions the tensors must agree.
    others = [
        Shape(
            shape.source,
            rank,
            {p: d for p, d in shape.dims.items() if p != position} | {position: 1},
        )
        for shape in shapes
    ]
    joined = broadcast(step, others)
    along: Dim = Token(step.node.name, position)
    if axes:
        along = Axis(tuple(part for axis in axes for part in axis.parts))
    return Shape(
        step.node.name, rank, {**joined.dims, position: along}, f"what {step.where} returns"
    )


def _of_pieces(step: Step, piece: Shape, dim: int) -> Any:
    """Equal pieces of an unknown number: along another dimension than a width."""
    position = piece.index(dim)
    unsure = piece.rank is None and any((p < 0) != (dim < 0) for p, _ in piece.axes)
    if unsure or isinstance(piece.at(position), Axis):
        return step.boundary("repeats the width")
    return piece.but(step.node.name, {**piece.dims, position: Token(step.node.name, position)})


def _stack(step: Step) -> Any:
    tensors, dim = step.argument(0, "tensors"), step.argument(1, "dim", 0)
    shapes = list(tensors) if isinstance(tensors, tuple | list) else []
    known = all(isinstance(shape, Shape) and shape.rank is not None for shape in shapes)
    if not shapes or not known or not isinstance(dim, int):
        return step.boundary() if axes_of(tensors) else Shape(step.node.name)
    joined = broadcast(step, shapes)
    if joined.rank is None:
        return joined
    dims = joined.every()
    dims.insert(dim % (joined.rank + 1), len(shapes))
    return joined.but(step.node.name, dict(enumerate(dims)), rank=len(dims))


def concat() -> TableProcessor:
    """Return the processor for ``cat`` and ``stack``."""
    return TableProcessor.of(
        (operations(["cat", "concat", "concatenate"]), _concatenate),
        (operations(["stack"]), _stack),
    )
