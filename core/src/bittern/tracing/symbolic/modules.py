"""Nodes that call a module whose symbols are known."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from bittern.tracing.symbolic.dependencies import NodeProcessor, Step
from bittern.tracing.symbolic.linking import match_dims
from bittern.tracing.symbolic.symbols import Layout, Symbol, SymInfo
from bittern.tracing.symbolic.values import Axis, Dim, Shape, axes_of, rank_of

__all__ = ["SymbolModuleProcessor"]


class SymbolModuleProcessor(NodeProcessor):
    """A module with symbols: what it reads is tied to what produced it.

    With an outgoing symbol its output has a new width, or one that follows the input (depthwise
    convolutions); without, the output has the input's (norms). A module that is called several
    times is tied to all of its inputs.
    """

    def matches(self, step: Step) -> bool:
        """Take modules with cross-layer symbols."""
        return isinstance(step.target, nn.Module) and step.walk.symbols.is_leaf(step.target)

    def process(self, step: Step) -> Any:
        """Tie the incoming symbols, then give the output its widths."""
        module = step.target
        info = step.walk.symbols.info(module)
        assert isinstance(info, SymInfo)
        incoming: dict[int, list[Symbol]] = {}
        outgoing = [symbol for _, symbol in info if symbol.is_outgoing]
        for _, symbol in info:
            step.walk.linker.enter(symbol)
            if symbol.is_incoming:
                incoming.setdefault(symbol.argument, []).append(symbol)
        read: dict[Symbol, Axis] = {}
        arguments = _arguments(step, module)
        for position, symbols in incoming.items():
            value = arguments.pop(position, None)
            if value is not None:
                read |= self._read(step, value, symbols)
        leftover = axes_of(list(arguments.values()))
        if leftover:
            step.walk.linker.block(leftover, f"{step.where} has no symbol for this argument")
        first = step.first if isinstance(step.first, Shape) else Shape(step.node.name)
        if not outgoing:
            return first if info.is_shape_preserving else step.boundary()
        widths = {}
        for out in outgoing:
            twin = info.twins.get(out)
            if twin is not None and twin in read:
                out.layout = twin.layout
                widths[out] = read[twin]
            else:
                layout = Layout("outer", out.repeats) if out.repeats > 1 else None
                widths[out] = Axis((out,), layout)
        shape = _output(step, info, first, widths)
        if info.returns_tuple:
            rest = Shape(f"{step.node.name}_rest", loose=tuple(widths.values()))
            return (shape, rest)
        return shape

    @staticmethod
    def _read(step: Step, value: Any, symbols: list[Symbol]) -> dict[Symbol, Axis]:
        """Tie the symbols of one argument; return which width each reads."""
        shape = value if isinstance(value, Shape) else Shape("")
        pairs = _match(symbols, shape)
        if pairs and not shape.loose:
            return {
                symbol: axis
                for symbol, axis in pairs.items()
                if step.walk.linker.follow(symbol, axis, step.where)
            }
        axes = axes_of(value)
        if axes:
            reason = f"{step.where} reads another dimension than the one that is known"
        else:
            reason = f"{step.where} reads {shape.origin or 'what is no layer output'}"
        step.walk.linker.block([*axes, *(Axis((symbol,)) for symbol in symbols)], reason)
        return {}


def _match(symbols: list[Symbol], shape: Shape) -> dict[Symbol, Axis]:
    """Pair the symbols with the widths of a shape by the names of their dimensions."""
    axes = shape.axes
    aliases = [shape.aliases(position) for position, _ in axes]
    if (
        len(symbols) == len(axes) == 1
        and shape.rank is None
        and symbols[0].elastic_dims == {1}
        and aliases[0] == {-1}
        and symbols[0].size is not None
        and symbols[0].size == axes[0][1].width
    ):
        # (N, C) by all that can be known: the sizes agree.
        return {symbols[0]: axes[0][1]}
    found = match_dims([symbol.elastic_dims for symbol in symbols], aliases)
    return {symbols[i]: axes[j][1] for i, j in found.items()}


def _output(step: Step, info: SymInfo, first: Shape, widths: dict[Symbol, Axis]) -> Shape:
    """Return the output's shape: its widths, and what it takes over from the first argument."""
    keeps = info.is_shape_preserving or info.kept_dims != "none"
    rank = first.rank if keeps else None
    if rank is None:
        rank = next(filter(None, (rank_of(out.elastic_dims) for out in widths)), None)
    dims: dict[int, Dim] = {}
    for out, axis in widths.items():
        names = sorted(out.elastic_dims)
        if rank is None:
            dims |= dict.fromkeys(names, axis)
        else:
            dims[names[0] % rank] = axis
    if keeps and rank is not None:
        every = first.rank is not None and info.kept_dims != "leading"
        for position in range(rank if every else min(dims)):
            dims.setdefault(position, first.at(position))
    return Shape(step.node.name, rank, dims, f"what {step.where} returns")


def _arguments(step: Step, module: nn.Module) -> dict[int, Any]:
    """Return the values of the arguments of ``forward`` by position."""
    found = dict(enumerate(step.args))
    if step.kwargs:
        names = list(inspect.signature(module.forward).parameters)
        for extra, (name, value) in enumerate(step.kwargs.items()):
            position = names.index(name) if name in names else len(names) + extra
            found[position] = value
    return {position: value for position, value in found.items() if value is not None}
