"""Recurrent layers, each one operator: ``lstm``, ``gru`` and ``rnn``."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis, total
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = ["recurrent"]


def recurrent(node: OpNode, flow: Flow, gates: int = 1) -> list[Axes | None]:
    """``lstm(input, hidden, params, has_biases, layers, dropout, train, bidirectional, ...)``.

    Weights are ``(gates x hidden, in)`` and ``(gates x hidden, out)``, where ``out`` is the hidden
    size, or the size of an LSTM's projection ``(out, hidden)``. The packed form takes the batch
    sizes as second argument.

    Args:
        node: The node.
        flow: The pass.
        gates: Rows per hidden unit: 4 for an LSTM, 3 for a GRU, 1 for a plain RNN.
    """
    packed = isinstance(node.args[1], Value) and isinstance(node.args[2], Value | list)
    packed = packed and node.op.endswith(".data")
    x = flow.of(node.tensor(0))
    hidden, params = (node.args[2], node.args[3]) if packed else (node.args[1], node.args[2])
    rest = node.args[4:] if packed else node.args[3:]
    biases, layers, directions = rest[0], rest[1], 2 if rest[4] else 1
    states = hidden if isinstance(hidden, list) else [hidden]
    each = len(params) // (layers * directions)
    projected = each == (5 if biases else 3)
    features = x[-1]
    for layer in range(layers):
        outs = []
        for way in range(directions):
            start = (layer * directions + way) * each
            own = params[start : start + each]
            outs.append(_cell(own, features, gates, flow, node, biases=biases, proj=projected))
        features = total(outs) if len(outs) > 1 else outs[0]
    units = {a.size: a for a in (features, *_units(params, gates, flow))}
    for state in states:
        axes = flow.of(state)
        if layers * directions == 1 and axes[-1].size in units:
            flow.same(units[axes[-1].size], axes[-1])
        elif state.kind != "activation" or any(a.size > 1 for a in axes[:1]):
            axes[-1].fix(f"it is the state of several layers ({flow.where(node)})")
    made: list[Axes | None] = [(*x[:-1], features)]
    for value in node.outputs[1:]:
        if value is None:
            made.append(None)
        elif layers * directions == 1 and value.shape[-1] in units:
            lead = tuple(Axis(n, fixed="data") for n in value.shape[:-1])
            made.append((*lead, units[value.shape[-1]]))
        else:
            made.append(_states(value, params, each, projected, gates, flow, node))
    return made


def _units(params: list[Value], gates: int, flow: Flow) -> list[Axis]:
    rows = flow.of(params[0])[0]
    parts = flow.factor(rows, (gates, rows.size // gates), "recurrent")
    return [parts[1]]


def _states(
    value: Value,
    params: list[Value],
    each: int,
    projected: bool,
    gates: int,
    flow: Flow,
    node: OpNode,
) -> Axes:
    """The last states of several layers lie in one tensor: their units become one axis."""
    cells = [params[k : k + each] for k in range(0, len(params), each)]
    units: list[Axis] = []
    for own in cells:
        rows = flow.of(own[0])[0]
        unit = flow.factor(rows, (gates, rows.size // gates), flow.where(node))[1]
        if projected and value.shape[-1] == own[-1].shape[0] != unit.size:
            unit = flow.of(own[-1])[0]
        units.append(unit)
    for unit in units[1:]:
        if value.users:
            flow.same(units[0], unit)
    lead = tuple(Axis(n, fixed="data") for n in value.shape[:-1])
    return (*lead, units[0])


def _cell(
    own: list[Value],
    features: Axis,
    gates: int,
    flow: Flow,
    node: OpNode,
    *,
    biases: bool,
    proj: bool,
) -> Axis:
    """Relate the weights of one layer in one direction; return the axis of its output."""
    where = flow.where(node)
    w_in, w_hidden = flow.of(own[0]), flow.of(own[1])
    flow.same(features, w_in[1])
    sizes = (gates, w_in[0].size // gates)
    stacked = [w_in[0], w_hidden[0]]
    if biases:
        stacked += [flow.of(own[2])[0], flow.of(own[3])[0]]
    unit: Axis | None = None
    for axis in stacked:
        gate, rows = flow.factor(axis, sizes, where)
        gate.fix("its positions are the gates of a recurrent layer")
        unit = rows if unit is None else flow.same(unit, rows)
    assert unit is not None
    if not proj:
        flow.same(unit, w_hidden[1])
        return unit
    out, inner = flow.of(own[-1])
    flow.same(inner, unit)
    flow.same(out, w_hidden[1])
    return out
