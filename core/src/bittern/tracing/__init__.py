"""The trace: which tensors of a model belong together."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bittern.tracing.symbolic import Symbol, SymInfo, SymMap

__all__ = ["SymInfo", "SymMap", "Symbol"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("bittern.tracing.symbolic"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
