"""Which dimensions belong together, for tracing, pruning and search.

Most of it a trace finds by itself, from the operators that a model runs. What it cannot know is
what a framework's own operators do, and what the dimensions of a layer that it must not enter are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bittern.tracing import SymInfo
    from bittern.tracing.flow import Axes, Flow, OpNode

    from heron_framework.layers import Linear


def linear_symbols(module: Linear) -> SymInfo:
    """Return the symbols of a linear layer.

    What comes in is decided by somebody else; what goes out may be changed, and others follow.
    """
    from bittern.tracing import Symbol, SymInfo

    kinds = Symbol.CLType
    return SymInfo(
        kept_dims="other",
        in_features=Symbol(cl_type=kinds.INCOMING, elastic_dims={-1}, tensors={"weight": 1}),
        out_features=Symbol(
            is_searchable=True,
            cl_type=kinds.OUTGOING,
            elastic_dims={-1},
            tensors={"weight": 0, "bias": 0},
        ),
    )


def elementwise(node: OpNode, flow: Flow) -> Axes:
    """Say that an operator's output has the dimensions of its first argument."""
    return flow.of(node.tensor(0))
