"""Which widths of a model may change, what changes along, and why the others may not.

    symbols = analyze_symbols(model)
    dict(symbols.named_symbols(searchable=True))

The convention about inputs is that of torch's layers: images and sequences have a batch dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from bittern.records import LeafRule, SymbolRule
from bittern.registry import ClassTable
from bittern.tracing.symbolic.collection import GraphCollection, recursive_trace
from bittern.tracing.symbolic.dependencies import GraphDependencyProcessor, NodeProcessor
from bittern.tracing.symbolic.depth import find_skippable_blocks
from bittern.tracing.symbolic.sharing import tie_shared_parameters
from bittern.tracing.symbolic.symbols import Symbol
from bittern.tracing.symbolic.symmap import SymMap

__all__ = ["Analyzer", "analyze_symbols"]


class Analyzer:
    """The graphs and symbols of a model, analysed.

    Args:
        model: The model; it is left as it was.
        concrete_args: Values of arguments of ``forward`` that are no tensors.
        rules: Which function knows the symbols of which class; core's own if left out.
        leaves: Rules about classes that the tracer must not enter.
        processors: Kinds of graph nodes to try before core's own.

    Attributes:
        collection: The graphs.
        symbols: The symbols of every module that has a rule.
    """

    def __init__(
        self,
        model: nn.Module,
        concrete_args: Mapping[str, Any] | None = None,
        *,
        rules: ClassTable[SymbolRule] | None = None,
        leaves: ClassTable[LeafRule] | None = None,
        processors: Iterable[NodeProcessor] = (),
    ) -> None:
        self.symbols = SymMap(model, rules)
        self.collection: GraphCollection = recursive_trace(
            model, concrete_args, leaves=leaves, is_leaf=self.symbols.is_leaf
        )
        walk = GraphDependencyProcessor(self.collection, self.symbols, processors=processors)
        tie_shared_parameters(model, self.symbols, walk.linker)
        for module in self.collection.reached_into:
            for _, symbol in self.named_cross_layer_symbols(module):
                name = self.symbols.name_of(module)
                symbol.disable(f"{name} is called from a module that cannot be traced")
        walk.process()
        self._close()
        find_skippable_blocks(model, self.symbols, walk, concrete_args=concrete_args, leaves=leaves)

    @property
    def reasons(self) -> dict[str, str]:
        """Every constant symbol by name, with the reason why it is."""
        return {n: symbol.reason for n, symbol in self.symbols.named_symbols(constant=True)}

    def named_cross_layer_symbols(self, module: nn.Module) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols of a module that other layers meet."""
        for name, symbol in self._symbols(module):
            if symbol.is_cross_layer:
                yield name, symbol

    def named_dangling_symbols(self, module: nn.Module) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols of a module that other layers meet and nothing is known about."""
        for name, symbol in self._symbols(module):
            if symbol.is_dangling:
                yield name, symbol

    def named_searchable_out_symbols(self, module: nn.Module) -> Iterator[tuple[str, Symbol]]:
        """Yield the outgoing symbols of a module that may take another value."""
        for name, symbol in self._symbols(module):
            if symbol.is_outgoing and symbol.is_searchable:
                yield name, symbol

    def _symbols(self, module: nn.Module) -> Iterable[tuple[str, Symbol]]:
        return self.symbols.info(module) or ()

    def _close(self) -> None:
        """Make constant what no graph says anything about."""
        unused = []
        for path, module in self.symbols.named_modules():
            unvisited = self.collection.is_unvisited(module)
            left = [
                symbol
                for _, symbol in self.named_cross_layer_symbols(module)
                if unvisited or symbol.is_dangling
            ]
            for symbol in left:
                symbol.disable(
                    f"{path} is never called" if unvisited else f"{path} reads no known width"
                )
            if unvisited and left:
                unused.append(path)
        if unused:
            warnings.warn(
                f"never called, so their widths are constant: {', '.join(unused)}", stacklevel=4
            )


def analyze_symbols(
    model: nn.Module,
    concrete_args: Mapping[str, Any] | None = None,
    *,
    rules: ClassTable[SymbolRule] | None = None,
    leaves: ClassTable[LeafRule] | None = None,
    processors: Iterable[NodeProcessor] = (),
) -> SymMap:
    """Find which widths of a model may change, and what changes along.

    Args:
        model: The model; on any device, also ``meta``. It is left as it was.
        concrete_args: Values of arguments of ``forward`` that are no tensors.
        rules: Which function knows the symbols of which class; core's own if left out.
        leaves: Rules about classes that the tracer must not enter.
        processors: Kinds of graph nodes to try before core's own.

    Returns:
        The symbols; none is free. A constant one carries its ``reason``.

    Warns:
        UserWarning: Modules are never called.
    """
    analyzer = Analyzer(model, concrete_args, rules=rules, leaves=leaves, processors=processors)
    return analyzer.symbols
