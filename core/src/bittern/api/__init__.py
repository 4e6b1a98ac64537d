"""The public functions: each calls the method of the default Toolkit with the same name."""

from bittern.api.search import auto_quantize
from bittern.api.state import apply_mode, compress, fold, modes_of, restore, save, unfold
from bittern.api.steps import (
    analyze_symbols,
    calibrate,
    evaluate,
    export,
    load,
    plan,
    quantize,
    recursive_trace,
    revert,
    trace,
    verify,
)
from bittern.api.training import distill, train_ranges

__all__ = [
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
]
