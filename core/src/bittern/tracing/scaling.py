"""Follows a per-channel positive scale through the graph until weights take it up.

A tensor is *scaled* when multiplying the coordinates of some leaves by positive numbers multiplies
its elements by the same numbers. ReLU, a product with another tensor, attention over values and the
repetition of heads keep a tensor scaled; a linear layer over the scaled channels ends it: there the
weight's columns can be divided by the numbers. Whatever else reads a scaled tensor makes the whole
attempt illegal.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bittern.tracing.chains import MOVES, RENAMES, contraction, source, stem
from bittern.tracing.flow import Axis, Flow, OpNode, Value

__all__ = ["Absorbed", "follow"]

_POOLS = frozenset(
    f"{kind}{n}d"
    for kind in (
        "max_pool",
        "avg_pool",
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "upsample_nearest",
    )
    for n in (1, 2, 3)
)
# f(s x) = s f(x) for every s > 0, for the first argument.
_HOMOGENEOUS = (
    RENAMES
    | MOVES
    | _POOLS
    | frozenset(
        [
            "relu",
            "leaky_relu",
            "abs",
            "neg",
            "negative",
            "positive",
            "sum",
            "mean",
            "amax",
            "amin",
            "nansum",
            "repeat",
            "tile",
            "repeat_interleave",
            "index",
            "index_select",
            "upsample_bilinear2d",
            "upsample_linear1d",
            "upsample_trilinear3d",
            "upsample_bicubic2d",
        ]
    )
)
_PRODUCTS = frozenset(["matmul", "mm", "bmm", "einsum"])
_CUTS = frozenset(["slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split"])


@dataclass
class Absorbed:
    """Where a scale ended.

    Attributes:
        weights: Parameter to the axis of it whose coordinates are divided.
        biases: Vectors that were added on the way and have to be scaled, too.
        nodes: The nodes at which it ended.
    """

    weights: dict[Value, Axis] = field(default_factory=dict)
    biases: dict[Value, None] = field(default_factory=dict)
    nodes: set[OpNode] = field(default_factory=set)


def follow(
    starts: Iterable[Value], leaves: frozenset[Axis], flow: Flow, order: Mapping[OpNode, int]
) -> Absorbed | None:
    """Follow a scale of ``leaves`` from ``starts``; ``None`` where it meets what it may not.

    Args:
        starts: The tensors that are scaled first.
        leaves: The leaves whose coordinates are scaled.
        flow: The axes of all tensors.
        order: The nodes of the graph and their places in it.
    """
    return _Follower(leaves, flow, order).run(starts)


class _Follower:
    """One attempt: what is scaled by now, and where the scale ended."""

    def __init__(self, leaves: frozenset[Axis], flow: Flow, order: Mapping[OpNode, int]) -> None:
        self._leaves = leaves
        self._flow = flow
        self._order = order
        self._outputs = frozenset((*flow.graph.outputs, *flow.graph.waiting))
        self._scaled: set[Value] = set()
        self._queued: set[OpNode] = set()
        self._heap: list[tuple[int, OpNode]] = []
        self._found = Absorbed()

    def run(self, starts: Iterable[Value]) -> Absorbed | None:
        """Go through the nodes in order of execution, so that all scaled inputs are known."""
        if not self._add(starts):
            return None
        while self._heap:
            made = self._step(heapq.heappop(self._heap)[1])
            if made is None or not self._add(made):
                return None
        return self._found

    def _add(self, values: Iterable[Value]) -> bool:
        """Mark values as scaled; ``False`` where the model returns one of them."""
        for value in values:
            if value in self._outputs:
                return False
            self._scaled.add(value)
            for user in value.users:
                if user not in self._queued:
                    self._queued.add(user)
                    heapq.heappush(self._heap, (self._order[user], user))
        return True

    def _kept(self, value: Value) -> list[frozenset[Axis]]:
        """Return the scaled leaves of every dimension."""
        return [frozenset(axis.leaves()) & self._leaves for axis in self._flow.of(value)]

    def _all(self, value: Value) -> frozenset[Axis]:
        return frozenset().union(*self._kept(value))

    def _step(self, node: OpNode) -> list[Value] | None:
        """Return what a node makes of its scaled inputs, ``None`` where that is illegal."""
        name = stem(node.op)
        ins = [value for value in node.inputs() if value in self._scaled]
        first = ins[0]
        alone = len(ins) == 1
        leads = alone and bool(node.args) and node.args[0] is first
        pair = contraction(node)
        if pair is not None:
            return self._contract(node, *pair) if alone and first is pair[0] else None
        if name in _PRODUCTS:
            free = alone and not any(self._kept(first)[d] for d in _contracted(node, first))
            return self._same(node, ins) if free else None
        if name == "scaled_dot_product_attention":
            return self._same(node, ins) if ins == [node.args[2]] else None
        if name in ("mul", "multiply"):
            return self._same(node, ins) if alone else None
        if name in ("add", "sub"):
            return self._sum(node, ins)
        if name in ("cat", "concat"):
            others = [v for v in node.inputs() if v not in self._scaled]
            return None if any(self._all(v) for v in others) else self._same(node, ins)
        if not leads:
            return None
        if name in _CUTS:
            return [v for v in node.outputs if v is not None and self._all(v)]
        if name in _HOMOGENEOUS or name in ("div", "divide", "true_divide"):
            return self._same(node, ins)
        if name == "masked_fill":
            return self._same(node, ins) if node.args[2] == 0 else None
        if name == "constant_pad_nd":
            return self._same(node, ins) if not node.arg(2, "value", 0) else None
        return None

    def _same(self, node: OpNode, ins: list[Value]) -> list[Value] | None:
        """Return the outputs if all scaled leaves are in them, each in one dimension."""
        before = frozenset().union(*(self._all(value) for value in ins))
        outs = [value for value in node.outputs if value is not None]
        for value in outs:
            kept = self._kept(value)
            if frozenset().union(*kept) != before or sum(map(len, kept)) != len(before):
                return None
        return outs

    def _sum(self, node: OpNode, ins: list[Value]) -> list[Value] | None:
        """A sum stays scaled if everything in it is; a bias can be made so."""
        every = [a for a in node.args[:2] if isinstance(a, Value)]
        if len(every) != 2:
            return None
        for value in every:
            if value in ins:
                continue
            bias = source(value)
            if bias is None or self._all(value) != self._all(ins[0]):
                return None
            self._found.biases[bias] = None
        return self._same(node, ins)

    def _contract(self, node: OpNode, activation: Value, weight: Value) -> list[Value] | None:
        name, kept = stem(node.op), self._kept(activation)
        axes = self._flow.of(activation)
        if name.startswith("conv"):
            groups = node.args[8] if name == "convolution" else node.arg(6, "groups", 1)
            if groups != 1:
                return None
            at = len(axes) - len(weight.shape) + 1
        elif name == "einsum":
            return None
        else:
            (at,) = _contracted(node, activation)
        if kept[at]:
            if any(k for d, k in enumerate(kept) if d != at):
                return None
            self._found.weights[weight] = axes[at].find()
            self._found.nodes.add(node)
            return []
        biased = name in ("linear", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d")
        added = node.args[0] if name in ("addmm", "baddbmm") else node.arg(2, "bias")
        return None if biased and added is not None else self._same(node, [activation])


def _contracted(node: OpNode, operand: Value) -> list[int]:
    """Return the dimensions of an operand over which a product sums."""
    rank = len(operand.shape)
    if stem(node.op) != "einsum":
        right = node.op.split(".")[1] in ("matmul", "mm", "bmm") and node.args[1] is operand
        return [rank - 2 if right and rank > 1 else rank - 1]
    left, _, right_side = node.args[0].replace(" ", "").partition("->")
    for term, value in zip(left.split(","), node.args[1], strict=True):
        if value is operand:
            before, dots, after = term.partition("...")
            wide = rank - len(before) - len(after) if dots else 0
            letters = [*before, *("." * wide), *after]
            return [d for d, c in enumerate(letters) if c != "." and c not in right_side]
    return list(range(rank))
