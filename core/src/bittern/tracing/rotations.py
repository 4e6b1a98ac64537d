"""Finds the channels of a model that can be rotated: all that makes and reads them is linear.

Channels are a leaf of the flow's axes. If every tensor with such a leaf is multiplied by one
orthogonal matrix ``R`` along it, weights and biases among them, the model computes what it did as
long as every operator that meets the leaf commutes with ``R``, or sums over it with both operands
rotated. Sums of tensors, views, casts, gathers and attention over values do; a root mean square
does, which is why a residual stream between RMSNorms can be rotated (Ashkboos et al., QuaRot,
2024). A gain of a norm does not, but can move into the weights that read it. What subtracts a mean,
as LayerNorm does, commutes with an ``R`` that leaves the vector of ones alone.

Whatever else meets the channels is a reason to leave them as they are. No names are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch

from bittern.records import Member
from bittern.tracing.chains import MOVES, RENAMES, contraction, stem
from bittern.tracing.flow import Axis, Flow, OpNode, Value, positions, values_in

__all__ = ["Gain", "Rotatable", "Turn", "find_rotations"]


@dataclass(frozen=True)
class Gain:
    """A vector that multiplies normalized channels.

    Attributes:
        name: Full name of the parameter.
        offset: The factor is the parameter plus this.
    """

    name: str
    offset: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A parameter that is to be rotated.

    Attributes:
        member: Its dimension, and where each channel lies in it.
        gains: By what its channels are to be multiplied before; one tuple per place that reads it.
        added: Whether it is added to channels that have these gains: it is to be divided by them.
        reads: Whether a product sums over its channels.
    """

    member: Member
    gains: tuple[tuple[Gain, ...], ...]
    added: bool = False
    reads: bool = False


@dataclass(frozen=True)
class Rotatable:
    """Channels that can be rotated, or why not.

    Attributes:
        name: Full name of the first parameter that has them, vectors aside.
        size: How many they are.
        turns: What is to be rotated.
        gains: What is to be 1 afterwards.
        ones: Whether the rotation must leave the vector of ones as it is.
        parts: Whether they are a factor of a dimension of some parameter, as those of a head are.
        normalized: Whether statistics over them are computed.
        reason: Why they cannot be rotated, ``""`` if they can.
    """

    name: str
    size: int
    turns: tuple[Turn, ...] = ()
    gains: tuple[Gain, ...] = ()
    ones: bool = False
    parts: bool = False
    normalized: bool = False
    reason: str = ""


def find_rotations(flow: Flow) -> tuple[Rotatable, ...]:
    """Return the channels that parameters share, in the order in which the model meets them.

    Args:
        flow: A run of the model.
    """
    owned: dict[Axis, list[Value]] = {}
    for value in flow.graph.stored.values():
        if value.kind == "parameter" and value.users:
            for leaf in _leaves(value, flow):
                owned.setdefault(leaf, []).append(value)
    nodes: dict[Axis, dict[OpNode, None]] = {leaf: {} for leaf in owned}
    for node in flow.graph.nodes:
        for value in (*node.inputs(), *(v for v in node.outputs if v is not None)):
            for leaf in _leaves(value, flow):
                if leaf in nodes:
                    nodes[leaf][node] = None
    ends = frozenset((*flow.graph.outputs, *flow.graph.waiting))
    return tuple(
        _Walk(leaf, flow, ends).run(nodes[leaf], values)
        for leaf, values in owned.items()
        if len(values) > 1
    )


def _leaves(value: Value, flow: Flow) -> dict[Axis, None]:
    return {leaf: None for a in flow.of(value) if a.size > 1 for leaf in a.leaves()}


class _How(IntEnum):
    TURNED = 0  # multiplied by R along the channels
    VECTOR = 1  # a parameter that is nothing but channels: a bias or a gain
    SQUARED = 2


@dataclass(frozen=True)
class _State:
    """What a tensor is once the channels are rotated.

    Attributes:
        how: See there.
        gains: Gains that it has now, and will not have then.
        origin: The parameter that it is, or is a part of.
        offset: What was added to that.
    """

    how: _How = _How.TURNED
    gains: tuple[Gain, ...] = ()
    origin: Value | None = None
    offset: float = 0.0


class _StopError(Exception):
    """The channels cannot be rotated."""


# f(x R) = f(x) R where f leaves the channels alone, for the first argument.
_CUTS = frozenset(["slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split"])
_LINEAR = frozenset(["neg", "negative", "sum", "mean", "repeat", "repeat_interleave", "tile"])
_LOOKUPS = frozenset(["select", "index", "index_select", "unbind"])
_CARRY = RENAMES | MOVES | _CUTS | _LINEAR | _LOOKUPS
_JOINS = frozenset(["add", "sub", "cat", "concat", "stack", "where", "index_add", "index_put"])
_CONVOLUTIONS = frozenset(
    ["convolution", "_convolution"]
    + [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
)
_PRODUCTS = _CONVOLUTIONS | frozenset(
    ["linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "_grouped_mm"]
)
_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"])
_SUMS = frozenset(["sum", "mean", "var", "std", "linalg_vector_norm"])
_NORMS = frozenset(["rms_norm", "_fused_rms_norm", "layer_norm", "native_layer_norm"])
_LOOKS = frozenset(["_assert_tensor_metadata"])


@dataclass
class _Walk:
    """One attempt at some channels."""

    leaf: Axis
    flow: Flow
    ends: frozenset[Value]
    ones: bool = False
    states: dict[Value, _State] = field(default_factory=dict)
    uses: dict[Value, dict[tuple[tuple[Gain, ...], bool], None]] = field(default_factory=dict)
    gains: dict[Value, Gain] = field(default_factory=dict)
    read: set[Value] = field(default_factory=set)

    def run(self, nodes: Iterable[OpNode], values: Sequence[Value]) -> Rotatable:
        """Look at every node that meets the channels, in order of execution."""
        mark, found = self.leaf.mark, Rotatable(_named(values), self.leaf.size)
        terms = [t for v in values for a in self.flow.of(v) for t in a.terms()]
        parts = any(t is not self.leaf and self.leaf in t.leaves() for t in terms)
        found = replace(found, parts=parts, normalized=bool(mark.normalized), reason=mark.fixed)
        if found.reason:
            return found
        try:
            for node in nodes:
                self._step(node)
            turns = self._turns()
        except _StopError as stop:
            return replace(found, reason=str(stop))
        return replace(found, turns=turns, gains=tuple(self.gains.values()), ones=self.ones)

    # --- what is found ---

    def _dims(self, value: Value) -> list[int]:
        axes = self.flow.of(value)
        return [d for d, a in enumerate(axes) if a.size > 1 and self.leaf in a.leaves()]

    def _turns(self) -> tuple[Turn, ...]:
        turns = []
        for value, uses in self.uses.items():
            if value in self.gains:
                raise _StopError(f"{value.name} is a factor here and a term or a weight there")
            if len({added for _, added in uses}) > 1:
                raise _StopError(f"{value.name} is added before a gain and after it")
            (dim,) = self._dims(value)
            rows = positions(self.flow.of(value)[dim]).get(self.leaf)
            if rows is None:
                raise _StopError(f"{value.name} has the channels twice in one dimension")
            module, _, tensor = value.name.rpartition(".")
            member = Member(module, tensor, dim, torch.from_numpy(rows))
            gains = tuple(dict.fromkeys(gains for gains, _ in uses))
            turns.append(Turn(member, gains, any(a for _, a in uses), value in self.read))
        return tuple(turns)

    # --- states ---

    def _has(self, value: object) -> bool:
        return isinstance(value, Value) and bool(self._dims(value))

    def _state(self, value: Value) -> _State:
        if value not in self.states:
            if value.kind != "parameter":
                raise _StopError(f"what a {value.kind} holds cannot be rotated")
            self._once(value)
            only = max(value.shape) == _count(value)
            self.states[value] = _State(_How.VECTOR if only else _How.TURNED, origin=value)
        return self.states[value]

    def _turned(self, value: Value) -> _State:
        """Return the state of a tensor that is read as one that is rotated."""
        state = self._state(value)
        if state.how is _How.SQUARED or state.offset:
            raise _StopError(
                "what is computed of its channels one by one is read by another operator"
            )
        return replace(state, how=_How.TURNED)

    def _plain(self, value: Value, where: str) -> _State:
        """Return the state of a tensor that may have no gains."""
        state = self._turned(value)
        if state.gains:
            raise _StopError(f"{where} reads the channels with the gain {state.gains[-1].name}")
        return state

    def _use(self, value: Value, gains: tuple[Gain, ...] = (), *, added: bool = False) -> None:
        self.uses.setdefault(value, {})[(gains, added and bool(gains))] = None

    def _once(self, value: Value) -> None:
        if len(self._dims(value)) > 1:
            raise _StopError(f"{value!r} has the channels in two dimensions")
        if value in self.ends:
            raise _StopError("the model returns them")

    # --- the nodes ---

    def _step(self, node: OpNode) -> None:
        name, where = stem(node.op), self.flow.where(node)
        ins = [value for value in node.inputs() if self._has(value)]
        outs = [value for value in node.outputs if value is not None and self._has(value)]
        if name in _LOOKS or (name == "type_as" and not self._has(node.args[0])):
            return
        if not node.op.startswith("aten."):
            raise _StopError(f"{where} is not looked into")
        state = self._rule(name, where, node, ins, outs)
        for value in outs:
            if not value.floating:
                raise _StopError(f"{where} makes numbers that are no floats of single channels")
            self._once(value)
            self.states[value] = state

    def _rule(
        self, name: str, where: str, node: OpNode, ins: list[Value], outs: list[Value]
    ) -> _State:
        """Return the state of a node's outputs."""
        if name in _ZEROS:
            return _State()
        if name in _PRODUCTS and ins:
            return self._product(node, ins, outs)
        leads = bool(ins) and ins[0] is next(values_in(node.args), None)
        alone = leads and (len(ins) == 1 or name == "type_as")  # the other gives a dtype only
        if name == "embedding" and alone and outs:
            self._use(ins[0])
            return _State()
        if name in _NORMS and leads and outs:
            return self._norm(name, where, node)
        if name in _SUMS and alone and not outs:
            return self._statistic(name, where, node, ins[0])
        if name in ("pow", "square") and alone and node.arg(1, "exponent", 2) == 2:
            self._plain(ins[0], where)
            return _State(_How.SQUARED)
        if name in ("mul", "multiply") and len(ins) == 2:
            return self._scaled(where, *ins)
        if name in ("mul", "multiply") and len(ins) == 1:
            return self._turned(ins[0])
        if (
            name in ("div", "divide", "true_divide")
            and alone
            and "rounding_mode" not in node.kwargs
        ):
            return self._turned(ins[0])
        if name in ("add", "sub") and len(ins) == 1:
            return self._shifted(name, where, node, ins[0])
        if name in _JOINS and len(ins) == _operands(node, name) and outs:
            return self._joined(ins)
        if name == "scaled_dot_product_attention" and ins == [node.args[2]] and outs:
            return self._turned(ins[0])
        if name in _CARRY and alone and (name in _CUTS or _whole(node, outs)):
            state = self._state(ins[0])
            if state.how is _How.SQUARED and name not in RENAMES:
                raise _StopError(f"{where} reads squares of single channels")
            return state
        raise _StopError(f"{where} looks at single channels")

    def _product(self, node: OpNode, ins: list[Value], outs: list[Value]) -> _State:
        where, name = self.flow.where(node), stem(node.op)
        if name in _CONVOLUTIONS:
            groups = node.args[8] if name.endswith("convolution") else node.arg(6, "groups", 1)
            if groups != 1:
                raise _StopError(f"{where} works on groups of channels")
        left, right, bias = _parts(node, name)
        both = [value for value in (left, right) if self._has(value)]
        if not outs:  # the product sums over them
            pair = contraction(node)
            if len(both) != 2 or len(ins) != 2 or pair is None:
                raise _StopError(f"{where} multiplies channels with something else")
            weight = self._turned(right if pair[0] is left else left).origin
            if weight is None or self._state(pair[0]).origin is not None:
                raise _StopError(f"{where} multiplies activations, or weights, with each other")
            self._use(weight, self._turned(pair[0]).gains)
            self.read.add(weight)
            return _State()
        if len(both) != 1 or (isinstance(bias, Value) and not self._has(bias)):
            raise _StopError(f"{where} multiplies single channels")
        made = self._turned(both[0])
        if made.origin is not None:
            self._use(made.origin)
        if isinstance(bias, Value):
            self._join(bias, made.gains)
        return _State(gains=made.gains)

    def _norm(self, name: str, where: str, node: OpNode) -> _State:
        value = node.tensor(0)
        shape, (dim,) = node.args[1], self._dims(value)
        if len(shape) != 1 or dim != len(value.shape) - 1:
            raise _StopError(f"{where} normalizes over other dimensions")
        state = self._plain(value, where)
        if state.origin is not None:
            self._use(state.origin)
        self.ones |= "layer" in name
        weight, bias = node.arg(2, "weight"), node.arg(3, "bias") if "layer" in name else None
        gains = (self._gain(weight, where),) if isinstance(weight, Value) else ()
        if isinstance(bias, Value):
            self._join(bias, gains)
        return _State(gains=gains)

    def _statistic(self, name: str, where: str, node: OpNode, value: Value) -> _State:
        """Sums over the channels: of squares they stay, others if ones are left alone."""
        if self._state(value).how is _How.SQUARED:
            if name not in ("sum", "mean"):
                raise _StopError(f"{where} reads squares of single channels")
        else:
            self._plain(value, where)
            if name != "linalg_vector_norm":
                self.ones = True
            elif node.arg(1, "ord", 2) != 2:
                raise _StopError(f"{where} computes a norm that depends on the directions")
        return _State()

    def _scaled(self, where: str, one: Value, two: Value) -> _State:
        """A product of two tensors with channels: a square, or a gain."""
        if one is two:
            self._plain(one, where)
            return _State(_How.SQUARED)
        states = [self._state(one), self._state(two)]
        if states[0].how is _How.VECTOR:
            one, two, states = two, one, states[::-1]
        if states[1].how is not _How.VECTOR or states[0].origin is not None:
            raise _StopError(f"{where} multiplies single channels")
        gain = self._gain(two, where)
        return _State(gains=(*self._turned(one).gains, gain))

    def _gain(self, value: Value, where: str) -> Gain:
        state = self._state(value)
        if state.how is not _How.VECTOR or state.origin is None:
            raise _StopError(f"{where} multiplies single channels")
        if max(state.origin.shape) != self.leaf.size:
            raise _StopError(f"{state.origin.name} multiplies more than these channels")
        found = Gain(state.origin.name, state.offset)
        if self.gains.setdefault(state.origin, found) != found:
            raise _StopError(f"{state.origin.name} is two factors")
        return found

    def _shifted(self, name: str, where: str, node: OpNode, value: Value) -> _State:
        """Something that has no channels is added to all of them."""
        state = self._state(value)
        other = node.args[1]
        if state.how is _How.VECTOR and name == "add" and not isinstance(other, Value):
            if node.kwargs.get("alpha", 1) != 1:
                raise _StopError(f"{where} scales what it adds")
            return replace(state, offset=state.offset + float(other))
        plain = self._plain(value, where)
        self.ones = True
        if plain.origin is not None:
            self._use(plain.origin)
        return _State()

    def _joined(self, values: list[Value]) -> _State:
        """Tensors that are added, or laid side by side, have one rotation and the same gains."""
        made = [v for v in values if self._turned(v).origin is None]
        gains = self._turned(made[0]).gains if made else ()
        for value in values:
            self._join(value, gains)
        return _State(gains=gains)

    def _join(self, value: Value, gains: tuple[Gain, ...]) -> None:
        state = self._turned(value)
        if state.origin is not None:
            self._use(state.origin, gains, added=True)
        elif state.gains != gains:
            names = ", ".join(g.name for g in (*state.gains, *gains))
            raise _StopError(f"channels with the gain {names} are added to others")


def _named(values: Sequence[Value]) -> str:
    return next((v for v in values if max(v.shape) < _count(v)), values[0]).name


def _count(value: Value) -> int:
    count = 1
    for size in value.shape:
        count *= size
    return count


def _whole(node: OpNode, outs: list[Value]) -> bool:
    """Whether all that a node returns has channels."""
    return all(value is None or value in outs for value in node.outputs)


def _operands(node: OpNode, name: str) -> int:
    """Return how many operands of a joining node have to have channels."""
    if name in ("cat", "concat", "stack"):
        return len(node.args[0])
    return 2


def _parts(node: OpNode, name: str) -> tuple[Value, Value, Value | None]:
    """Return the operands of a product and its bias."""
    if name == "einsum":
        if len(node.args[1]) != 2:
            raise _StopError("a product of more than two tensors")
        left, right = node.args[1]
        return left, right, None
    if name in ("addmm", "baddbmm"):
        bias, left, right = node.args[:3]
        return left, right, bias
    at = 3 if name == "_grouped_mm" else 2
    given = name in ("linear", "_grouped_mm") or name in _CONVOLUTIONS
    bias = node.arg(at, "bias") if given else None
    return node.tensor(0), node.tensor(1), bias
