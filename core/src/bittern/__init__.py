"""Bittern makes neural networks smaller and faster.

    import bittern as bt
    result = bt.quantize(model, "int8", data=batches)
    result.report.show()
    bt.export(model, "out/")

Importing this package costs nothing: names are loaded on first use. The steps are verbs
(`bt.plan`, `bt.export`), the packages behind them nouns (`bittern.planning`,
`bittern.exporting`), so that importing a package never hides a function.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bittern._version import __version__

if TYPE_CHECKING:
    from bittern.api import (
        analyze_symbols,
        apply_mode,
        auto_quantize,
        calibrate,
        compress,
        distill,
        evaluate,
        export,
        fold,
        load,
        modes_of,
        plan,
        quantize,
        recursive_trace,
        restore,
        revert,
        save,
        trace,
        train_ranges,
        unfold,
        verify,
    )
    from bittern.errors import BitternError, PluginError
    from bittern.hooks.markers import hookimpl
    from bittern.nn import QuantModule, TensorQuantizer
    from bittern.records import DataConfig, LoadConfig, Plan
    from bittern.report import Report, Result
    from bittern.toolkit import Toolkit
    from bittern.tracing.symbolic import (
        GraphCollection,
        GraphDependencyProcessor,
        NodeProcessor,
        RobustTracer,
        Symbol,
        SymInfo,
        SymMap,
    )
    from bittern.tracing.trace import Trace

__all__ = [
    "BitternError",
    "DataConfig",
    "GraphCollection",
    "GraphDependencyProcessor",
    "LoadConfig",
    "NodeProcessor",
    "Plan",
    "PluginError",
    "QuantModule",
    "Report",
    "Result",
    "RobustTracer",
    "SymInfo",
    "SymMap",
    "Symbol",
    "TensorQuantizer",
    "Toolkit",
    "Trace",
    "__version__",
    "analyze_symbols",
    "apply_mode",
    "auto_quantize",
    "calibrate",
    "compress",
    "distill",
    "evaluate",
    "export",
    "fold",
    "hookimpl",
    "load",
    "modes_of",
    "plan",
    "quantize",
    "recursive_trace",
    "restore",
    "revert",
    "save",
    "trace",
    "train_ranges",
    "unfold",
    "verify",
]

_HOMES = {
    "bittern.api": (
        "analyze_symbols",
        "apply_mode",
        "auto_quantize",
        "calibrate",
        "compress",
        "distill",
        "evaluate",
        "export",
        "fold",
        "load",
        "modes_of",
        "plan",
        "quantize",
        "recursive_trace",
        "restore",
        "revert",
        "save",
        "trace",
        "train_ranges",
        "unfold",
        "verify",
    ),
    "bittern.errors": ("BitternError", "PluginError"),
    "bittern.hooks.markers": ("hookimpl",),
    "bittern.nn": ("QuantModule", "TensorQuantizer"),
    "bittern.records": ("DataConfig", "LoadConfig", "Plan"),
    "bittern.report": ("Report", "Result"),
    "bittern.toolkit": ("Toolkit",),
    "bittern.tracing.symbolic": (
        "GraphCollection",
        "GraphDependencyProcessor",
        "NodeProcessor",
        "RobustTracer",
        "SymInfo",
        "SymMap",
        "Symbol",
    ),
    "bittern.tracing.trace": ("Trace",),
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
