"""Shared inputs: weights that multiply the very same tensor.

They want one input scale, one smoothing vector, one decision in a search.
"""

from __future__ import annotations

from bittern.tracing.chains import contraction, owner, root, stem
from bittern.tracing.flow import OpGraph, Value, values_in

__all__ = ["find_shared_inputs"]

_VIEWS = frozenset(["slice", "narrow", "select", "transpose", "permute", "t", "expand", "split"])


def find_shared_inputs(graph: OpGraph) -> tuple[tuple[str, ...], ...]:
    """Return the groups of two weights or more that read one tensor, in order of execution."""
    readers: dict[Value, dict[str, None]] = {}
    known: dict[object, Value] = {}
    for node in graph.nodes:
        if node.module in graph.sealed and node.op.startswith("module.") and node.kwargs:
            for value in filter(None, node.args[0]):  # a layer that is not looked into
                readers.setdefault(_first(value, known), {})[node.module] = None
            continue
        pair = contraction(node)
        if pair is None:
            continue
        activation, weight = pair
        every = graph.names.get(weight.name, (weight.name,))
        own = [n for n in every if n.rpartition(".")[0] == node.module]
        readers.setdefault(_first(activation, known), {})[owner((own or every)[0])] = None
    groups = dict.fromkeys(tuple(names) for names in readers.values() if len(names) > 1)
    return tuple(groups)


def _first(value: Value, known: dict[object, Value]) -> Value:
    """Return the first tensor that is the same view of the same memory."""
    value = root(value)
    node = value.producer
    if node is None or stem(node.op) not in _VIEWS:
        return value
    before = next(values_in(node.args))
    rest = repr([arg for arg in node.args if not isinstance(arg, Value)])
    which = node.outputs.index(value)
    return known.setdefault((stem(node.op), _first(before, known), rest, which), value)
