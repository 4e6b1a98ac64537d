"""Carries axes through modules that the tracer must not enter, by what their symbols say.

A fused layer of some framework is one opaque step. A leaf rule keeps the recorder out of it; if
there is a symbol rule for its class too, the symbols say which dimension of the input meets which
dimension of its parameters and which one comes out. What they do not speak of is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from bittern.records import SymbolRule
from bittern.registry import ClassTable, Match, bound
from bittern.tracing.flow import Axes, Axis, Flow, OpNode, Value

if TYPE_CHECKING:
    from bittern.tracing.symbolic import Symbol

__all__ = ["Sealed", "sealed_flow"]

Sealed = Callable[[OpNode, Flow], "Axes | None"]


def sealed_flow(model: nn.Module, rules: ClassTable[SymbolRule]) -> Sealed:
    """Return the rule for all modules that were not looked into.

    Args:
        model: The traced model.
        rules: Which dimensions module classes have.
    """

    def flow(node: OpNode, axes: Flow) -> Axes | None:
        module = model.get_submodule(node.module)
        match = rules.find(module, getattr(module, "original_class", type(module)))
        if not isinstance(match, Match) or len(node.outputs) != 1:
            return None
        from bittern.tracing.symbolic import SymInfo, SymMap

        SymMap(module, rules)  # checks the sizes, with the plugin's name on what is wrong
        info = bound(match.rule.symbols, plugin=match.plugin, returns=SymInfo)(module)
        return _carry(node, axes, info)

    return flow


def _carry(node: OpNode, flow: Flow, info: Any) -> Axes | None:
    positional: list[Value | None] = node.args[0]
    first = positional[0] if positional else None
    if first is None:
        return None
    met: dict[Symbol, Axis] = {}
    spoken: set[tuple[str, int]] = set()
    out: dict[int, Axis] = {}
    rank = len(node.out.shape)
    for _, symbol in info:
        if not hasattr(symbol, "elastic_dims"):
            continue
        axes = [
            axis
            for name, dims in symbol.tensors.items()
            if isinstance(node.kwargs.get(name), Value)
            for dim in dims
            if (axis := _rows(node, flow, (name, dim), symbol, spoken)) is not None
        ]
        if symbol.is_incoming:
            value = positional[symbol.argument] if symbol.argument < len(positional) else None
            if value is None:
                return None
            axes.append(flow.of(value)[_dim(symbol, len(value.shape))])
        if not axes:
            continue
        axis = met.setdefault(symbol.root, axes[0])
        for other in axes:
            flow.same(axis, other)
        axis.normalize(node.module)  # what happens inside is not known
        if not symbol.is_sortable:
            axis.unsort()
        if symbol.is_constant:
            axis.fix(symbol.reason or "its symbol is constant")
        if symbol.is_outgoing:
            out[_dim(symbol, rank) % rank] = axis
    _fix_the_rest(node, flow, spoken)
    return _output(node, flow, info, out)


def _rows(
    node: OpNode, flow: Flow, place: tuple[str, int], symbol: Symbol, spoken: set[tuple[str, int]]
) -> Axis | None:
    """Return the axis of a parameter's dimension, blocks of it taken apart."""
    name, dim = place
    axis = flow.of(node.kwargs[name])[dim]
    spoken.add((name, dim % len(node.kwargs[name].shape)))
    if symbol.size is None or axis.size == symbol.size:
        return axis
    if axis.size % symbol.size:
        return None
    sizes = (axis.size // symbol.size, symbol.size)
    blocks, rows = flow.factor(axis, sizes, flow.where(node))
    blocks.fix(f"its blocks mean something to {node.module}")
    return rows


def _dim(symbol: Symbol, rank: int) -> int:
    """Return the dimension that a symbol names: counted from the back where it can be."""
    back = [d for d in symbol.elastic_dims if d < 0]
    return max(back) if back else min(symbol.elastic_dims)


def _fix_the_rest(node: OpNode, flow: Flow, spoken: set[tuple[str, int]]) -> None:
    for name, value in node.kwargs.items():
        for dim, axis in enumerate(flow.of(value)):
            if (name, dim) not in spoken:
                axis.fix(f"no symbol of {node.module} speaks of it")
    for value in node.args[1]:
        for axis in flow.of(value):
            axis.fix(f"{node.module} reads it, and no symbol speaks of it")


def _output(node: OpNode, flow: Flow, info: Any, out: dict[int, Axis]) -> Axes:
    first = next(value for value in node.args[0] if value is not None)
    axes, shape = flow.of(first), node.out.shape
    made: list[Axis] = []
    for dim, size in enumerate(shape):
        kept = info.is_shape_preserving or info.kept_dims == "other"
        kept = kept or (info.kept_dims == "leading" and dim == 0)
        kept = kept and len(axes) == len(shape) and axes[dim].size == size
        if dim in out and out[dim].size == size:
            made.append(out[dim])
        elif kept:
            made.append(axes[dim])
        else:
            made.append(Axis(size, fixed=f"no symbol of {node.module} speaks of it"))
    if not all(kept is axes[d] for d, kept in enumerate(made[: len(axes)])):
        for dim, axis in enumerate(axes):
            if axis not in made and not _speaks(info, dim, len(axes)):
                axis.fix(f"{node.module} reads it, and no symbol speaks of it")
    return tuple(made)


def _speaks(info: Any, dim: int, rank: int) -> bool:
    return any(
        symbol.is_incoming and symbol.argument == 0 and _dim(symbol, rank) % rank == dim
        for _, symbol in info
        if hasattr(symbol, "elastic_dims")
    )
