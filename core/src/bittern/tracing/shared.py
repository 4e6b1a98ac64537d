"""Shared inputs: weights that multiply the very same tensor.

They want one input scale, one smoothing vector, one decision in a search.
"""

from __future__ import annotations

from bittern.tracing.chains import contraction, owner, root
from bittern.tracing.flow import OpGraph, Value

__all__ = ["find_shared_inputs"]


def find_shared_inputs(graph: OpGraph) -> tuple[tuple[str, ...], ...]:
    """Return the groups of two weights or more that read one tensor, in order of execution."""
    readers: dict[Value, dict[str, None]] = {}
    for node in graph.nodes:
        pair = contraction(node)
        if pair is not None:
            activation, weight = pair
            every = graph.names.get(weight.name, (weight.name,))
            own = [n for n in every if n.rpartition(".")[0] == node.module]
            readers.setdefault(root(activation), {})[owner((own or every)[0])] = None
    groups = dict.fromkeys(tuple(names) for names in readers.values() if len(names) > 1)
    return tuple(groups)
