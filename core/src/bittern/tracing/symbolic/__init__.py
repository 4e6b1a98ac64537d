"""The symbolic path of the trace: torch.fx graphs and symbols, without example inputs.

It needs nothing but the model, and says of every width whether it may change, what changes along,
and if not, why. Names are loaded on first use: core's hooks read `rules` without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bittern.tracing.symbolic.rules import SYMBOL_RULES
    from bittern.tracing.symbolic.symbols import Layout, Symbol, SymDepth, SymInfo
    from bittern.tracing.symbolic.symmap import SymMap

__all__ = ["SYMBOL_RULES", "Layout", "SymDepth", "SymInfo", "SymMap", "Symbol"]

_HOMES = {
    "rules": ("SYMBOL_RULES",),
    "symbols": ("Layout", "SymDepth", "SymInfo", "Symbol"),
    "symmap": ("SymMap",),
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
