"""The trace: which tensors of a model belong together.

Two ways in: `run_trace` runs the model on example inputs and carries axes through every operator
(`bittern.tracing.flow`); the symbolic path needs no inputs and sees what torch.fx can trace
(`bittern.tracing.symbolic`). Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bittern.tracing.symbolic import (
        Analyzer,
        GraphCollection,
        GraphDependencyProcessor,
        NodeProcessor,
        RobustTracer,
        Symbol,
        SymDepth,
        SymInfo,
        SymMap,
        analyze_symbols,
        recursive_trace,
    )
    from bittern.tracing.trace import Trace, run_trace

__all__ = [
    "Analyzer",
    "GraphCollection",
    "GraphDependencyProcessor",
    "NodeProcessor",
    "RobustTracer",
    "SymDepth",
    "SymInfo",
    "SymMap",
    "Symbol",
    "Trace",
    "analyze_symbols",
    "recursive_trace",
    "run_trace",
]

_HOMES = {
    "bittern.tracing.symbolic": (
        "Analyzer",
        "GraphCollection",
        "GraphDependencyProcessor",
        "NodeProcessor",
        "RobustTracer",
        "SymDepth",
        "SymInfo",
        "SymMap",
        "Symbol",
        "analyze_symbols",
        "recursive_trace",
    ),
    "bittern.tracing.trace": ("Trace", "run_trace"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
