"""The symbolic path of the trace: torch.fx graphs and symbols, without example inputs.

It needs nothing but the model, and says of every width whether it may change, what changes along,
and if not, why. Names are loaded on first use: core's hooks read `rules` without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bittern.tracing.symbolic.analyzer import Analyzer, analyze_symbols
    from bittern.tracing.symbolic.collection import GraphCollection, recursive_trace
    from bittern.tracing.symbolic.dependencies import GraphDependencyProcessor, NodeProcessor, Step
    from bittern.tracing.symbolic.linking import index_map, match_dims
    from bittern.tracing.symbolic.names import TableProcessor
    from bittern.tracing.symbolic.rules import SYMBOL_RULES
    from bittern.tracing.symbolic.symbols import Layout, Symbol, SymDepth, SymInfo
    from bittern.tracing.symbolic.symmap import SymMap
    from bittern.tracing.symbolic.tracer import RobustTracer
    from bittern.tracing.symbolic.values import Axis, Shape

__all__ = [
    "SYMBOL_RULES",
    "Analyzer",
    "Axis",
    "GraphCollection",
    "GraphDependencyProcessor",
    "Layout",
    "NodeProcessor",
    "RobustTracer",
    "Shape",
    "Step",
    "SymDepth",
    "SymInfo",
    "SymMap",
    "Symbol",
    "TableProcessor",
    "analyze_symbols",
    "index_map",
    "match_dims",
    "recursive_trace",
]

_HOMES = {
    "analyzer": ("Analyzer", "analyze_symbols"),
    "collection": ("GraphCollection", "recursive_trace"),
    "dependencies": ("GraphDependencyProcessor", "NodeProcessor", "Step"),
    "linking": ("index_map", "match_dims"),
    "names": ("TableProcessor",),
    "rules": ("SYMBOL_RULES",),
    "symbols": ("Layout", "SymDepth", "SymInfo", "Symbol"),
    "symmap": ("SymMap",),
    "tracer": ("RobustTracer",),
    "values": ("Axis", "Shape"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
