"""Which dimensions of a layer meet other layers, for tracing, pruning and search."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bittern.tracing import SymInfo

    from heron_framework.layers import Linear


def linear_symbols(module: Linear) -> SymInfo:
    """Return the symbols of a linear layer.

    What comes in is decided by somebody else; what goes out may be changed, and others follow.
    """
    from bittern.tracing import Symbol, SymInfo

    kinds = Symbol.CLType
    return SymInfo(
        in_features=Symbol(cl_type=kinds.INCOMING, elastic_dims={-1}),
        out_features=Symbol(is_searchable=True, cl_type=kinds.OUTGOING, elastic_dims={-1}),
    )
