"""Recurrent layers, each one operator: ``lstm``, ``gru`` and ``rnn``."""

from __future__ import annotations

from dataclasses import dataclass

from bittern.tracing.flow.axes import Axis, total
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = ["recurrent"]


@dataclass(frozen=True)
class _Kind:
    """What all cells of one call have in common.

    Attributes:
        gates: Rows per hidden unit.
        biases: Whether there are biases.
        projected: Whether the output is projected.
        where: Where it is called.
    """

    gates: int
    biases: bool
    projected: bool
    where: str


def recurrent(node: OpNode, flow: Flow, gates: int = 1) -> list[Axes | None]:
    """``lstm(input, hidden, params, has_biases, layers, dropout, train, bidirectional, ...)``.

    Weights are ``(gates x hidden, in)`` and ``(gates x hidden, out)``, where ``out`` is the hidden
    size, or the size of an LSTM's projection ``(out, hidden)``. The packed form takes the batch
    sizes as second argument. All layers and directions share their states' tensors, so their units
    are one axis.

    Args:
        node: The node.
        flow: The pass.
        gates: Rows per hidden unit: 4 for an LSTM, 3 for a GRU, 1 for a plain RNN.
    """
    packed = node.op.endswith(".data")
    args = node.args[2:] if packed else node.args[1:]
    hidden, params, biases, layers, _, _, bidirectional = args[:7]
    directions = 2 if bidirectional else 1
    each = len(params) // (layers * directions)
    kind = _Kind(gates, biases, each == (5 if biases else 3), flow.where(node))
    x = flow.of(node.tensor(0))
    features = x[-1]
    batch = _batch(node, flow, packed=packed, batch_first=not packed and node.args[-1])
    outs: list[Axis] = []
    units: list[Axis] = []
    for layer in range(layers):
        start = layer * directions * each
        ways = [params[start + way * each :][:each] for way in range(directions)]
        cells = [_cell(own, features, kind, flow) for own in ways]
        outs.extend(out for out, _ in cells)
        units.extend(unit for _, unit in cells)
        features = total(out for out, _ in cells)
    for every in (outs, units):
        flow.together([(axis,) for axis in every])
    ends = (outs[0], units[0])  # of the hidden state, and of an LSTM's cell state
    levels = Axis(layers * directions, fixed="its positions are layers and directions")
    states: list[Axes] = [(levels, batch, end) for end in ends]
    given = hidden if isinstance(hidden, list) else [hidden]
    for state, axes in zip(given, states, strict=False):
        flow.together([axes, flow.of(state)])
    return [(*x[:-1], features), *states[: len(node.outputs) - 1]]


def _batch(node: OpNode, flow: Flow, *, packed: bool, batch_first: bool) -> Axis:
    """Fix what counts steps; return the axis of sequences."""
    x = flow.of(node.tensor(0))
    if not packed:
        x[1 if batch_first else 0].fix(f"its order counts ({flow.where(node)})")
        return x[0 if batch_first else 1]
    for axis in (x[0], *flow.of(node.tensor(1))):
        axis.fix(f"steps and sequences are mixed in it ({flow.where(node)})")
    states = next(value for value in node.outputs[1:] if value is not None)
    return Axis(states.shape[1], fixed="data")


def _cell(own: list[Value], features: Axis, kind: _Kind, flow: Flow) -> tuple[Axis, Axis]:
    """Relate the weights of one layer in one direction; return the axes of output and units."""
    w_in, w_hidden = flow.of(own[0]), flow.of(own[1])
    flow.same(features, w_in[1])
    stacked = [w_in[0], w_hidden[0]]
    if kind.biases:
        stacked += [flow.of(own[2])[0], flow.of(own[3])[0]]
    units: list[Axis] = []
    for axis in stacked:
        gate, rows = flow.factor(axis, (kind.gates, axis.size // kind.gates), kind.where)
        gate.fix("its positions are the gates of a recurrent layer")
        units.append(rows)
    flow.together([(unit,) for unit in units])
    if not kind.projected:
        flow.same(units[0], w_hidden[1])
        return units[0], units[0]
    out, inner = flow.of(own[-1])
    flow.same(inner, units[0])
    flow.same(out, w_hidden[1])
    return out, units[0]
