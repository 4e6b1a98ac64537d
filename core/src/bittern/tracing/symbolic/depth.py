"""Which blocks of a sequential can be left out: those that add something to what goes in.

A block is a candidate if its input reaches its output through an addition and operations that
keep the shape. Candidates are then left out in a trace of their own: what fails additionally
(something outside reads into a block) rules them out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from bittern.records import LeafRule
from bittern.registry import ClassTable
from bittern.tracing.symbolic.collection import collect
from bittern.tracing.symbolic.dependencies import GraphDependencyProcessor
from bittern.tracing.symbolic.elementwise import SHAPE_PRESERVING_MODULES, SHAPE_PRESERVING_OPS
from bittern.tracing.symbolic.symbols import SymDepth
from bittern.tracing.symbolic.symmap import SymMap
from bittern.tracing.symbolic.tracer import RobustTracer

__all__ = ["find_skippable_blocks"]

_ADDITIONS = frozenset(
    (operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_, "add", "add_")
)


def find_skippable_blocks(
    model: nn.Module,
    symbols: SymMap,
    walk: GraphDependencyProcessor,
    *,
    concrete_args: Mapping[str, Any] | None = None,
    leaves: ClassTable[LeafRule] | None = None,
) -> None:
    """Find the skippable blocks of every sequential that has a depth.

    Args:
        model: The model; it is left as it was.
        symbols: Its symbols; the depths are changed.
        walk: The analysis of its graphs.
        concrete_args: As in the first trace.
        leaves: As in the first trace.
    """
    depths = {
        module: symbol
        for module in symbols
        for _, symbol in symbols.info(module) or ()
        if isinstance(symbol, SymDepth) and isinstance(module, nn.Sequential)
    }
    blocks: dict[nn.Module, bool] = {}
    for sequential in depths:
        for block in sequential:
            if block not in blocks:
                blocks[block] = _is_residual(block, walk)
    candidates = [block for block, residual in blocks.items() if residual]
    if candidates:

        def fails(skip: Iterable[nn.Module]) -> bool:
            tracer = RobustTracer(leaves=leaves, is_leaf=symbols.is_leaf, skip=skip)
            found = collect(model, tracer, concrete_args)
            return not set(found.failed) <= set(walk.collection.failed)

        candidates = _largest_working(candidates, fails)
    skippable = set(candidates)
    for sequential, symbol in depths.items():
        symbol.skippable = [i for i, block in enumerate(sequential) if block in skippable]
        if not symbol.skippable:
            symbol.disable("no block only adds to what goes in")


def _largest_working(blocks: list[nn.Module], fails: Any) -> list[nn.Module]:
    """Return the blocks that can be left out; halves what fails, so that few traces are needed."""
    if not fails(blocks):
        return blocks
    if len(blocks) == 1:
        return []
    half = len(blocks) // 2
    return [
        *_largest_working(blocks[:half], fails),
        *_largest_working(blocks[half:], fails),
    ]


def _is_residual(block: nn.Module, walk: GraphDependencyProcessor) -> bool:
    """Return whether the input reaches the output by additions and shape-preserving operations."""
    calls = walk.collection.calls_of(block)
    return bool(calls) and all(_reaches(*call, walk) for call in calls)


def _reaches(start: fx.Node, end: fx.Node, walk: GraphDependencyProcessor) -> bool:
    pending, seen = [(end, False)], set()
    while pending:
        node, added = pending.pop()
        if node is start:
            if added:
                return True
            continue
        if (node, added) in seen or node < start:
            continue
        seen.add((node, added))
        if node.target in _ADDITIONS:
            pending.extend((source, True) for source in node.all_input_nodes)
        elif _keeps_shape(node, walk):
            pending.extend((source, added) for source in node.all_input_nodes[:1])
    return False


def _keeps_shape(node: fx.Node, walk: GraphDependencyProcessor) -> bool:
    if node.op == "call_module":
        module = walk.collection.module_of(node)
        if module is None:
            return False
        return type(module) in SHAPE_PRESERVING_MODULES or walk.symbols.is_shape_preserving(module)
    return node.op in ("call_function", "call_method") and node.target in SHAPE_PRESERVING_OPS
