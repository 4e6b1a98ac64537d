"""Finds the producers into which a scale of their consumers' inputs can be folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bittern.records import Fold, Member
from bittern.tracing.chains import MOVES, RENAMES, contraction, owner, stem
from bittern.tracing.flow import Axis, Flow, Kind, OpNode, Value, values_in
from bittern.tracing.scaling import Absorbed, follow

__all__ = ["find_folds"]

_NORMS = frozenset(
    ["layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "native_layer_norm"]
)
_PARTS = frozenset(["select", "index", "index_select"])
_LARGEST = 2**62


@dataclass(frozen=True)
class _Source:
    """A parameter whose rows scale what its nodes make.

    Attributes:
        weight: The parameter.
        dim: The dimension that is scaled.
        rows: Which of its positions, ``None`` for all.
        axis: The axis of what is made.
        starts: The tensors that are made.
        biases: What is added to them at once.
    """

    weight: Value
    dim: int
    rows: NDArray[np.int64] | None
    axis: Axis
    starts: tuple[Value, ...]
    biases: tuple[Value, ...]


def find_folds(flow: Flow) -> tuple[Fold, ...]:
    """Return every legal fold, in the order in which the model's parameters are met."""
    order = {node: i for i, node in enumerate(flow.graph.nodes)}
    folds = []
    for value in flow.graph.stored.values():
        if value.kind != "parameter" or not value.users:
            continue
        for candidate in _sources(value, flow):
            absorbed = follow(candidate.starts, frozenset(candidate.axis.leaves()), flow, order)
            fold = _fold(candidate, absorbed, flow) if absorbed is not None else None
            if fold is not None:
                folds.append(fold)
                if candidate.rows is None:
                    break  # the whole output can be scaled; its parts need no fold of their own
    return tuple(folds)


def _reads(value: Value) -> Iterator[tuple[OpNode, Value]]:
    """Yield the nodes that compute with a parameter, and the form in which they read it."""
    for node in value.users:
        name = stem(node.op)
        if name in MOVES | _PARTS and next(values_in(node.args), None) is value:
            for made in node.outputs:
                if made is not None:
                    yield from _reads(made)
        else:
            yield node, value


def _sources(weight: Value, flow: Flow) -> Iterator[_Source]:
    """Yield the parameter as a producer: as a whole, then the parts its output is split into."""
    reads = list(_reads(weight))
    starts: list[Value] = []
    biases: dict[Value, None] = {}
    axis: Axis | None = None
    for node, form in reads:
        made = _made(node, form, weight, flow)
        if made is None or (axis is not None and made[0].find() is not axis.find()):
            return
        axis = made[0]
        starts.append(node.out)
        biases.update(dict.fromkeys(made[1]))
    if axis is None:
        return
    dims = [d for d, a in enumerate(flow.of(weight)) if a.find() is axis.find()]
    if len(dims) != 1:
        return
    yield _Source(weight, dims[0], None, axis, tuple(starts), tuple(biases))
    if len(starts) == 1:
        for part, rows in _parts(starts[0], axis, flow):
            at = [a for a in flow.of(part) if set(a.leaves()) <= set(axis.leaves()) and a.size > 1]
            if len(at) == 1:
                yield _Source(weight, dims[0], rows, at[0].find(), (part,), tuple(biases))


def _made(node: OpNode, form: Value, weight: Value, flow: Flow) -> tuple[Axis, list[Value]] | None:
    """Return the axis of a node's output that the parameter's rows are, and the biases."""
    name = stem(node.op)
    if name in _NORMS and len(weight.shape) == 1:
        at = 1 if name in ("batch_norm", "instance_norm") else 2
        if node.arg(at, "weight") is not form:
            return None
        return flow.of(form)[0], _values(node.arg(at + 1, "bias"))
    if name in ("mul", "multiply") and len(list(node.inputs())) == 2:
        wide = [a for a in flow.of(form) if a.size > 1]
        return (wide[0], []) if len(wide) == 1 else None
    pair = contraction(node)
    if pair is None or pair[1] is not weight:
        return None
    axes = flow.of(form)
    if name == "linear":
        return axes[0], _values(node.arg(2, "bias"))
    if name in ("mm", "matmul", "addmm", "_grouped_mm") and pair[0] in node.args[:2]:
        bias = _values(node.args[0]) if name == "addmm" else []
        return axes[-1], bias
    if name.startswith("conv"):
        channels = flow.of(node.out)[len(node.out.shape) - len(axes) + 1]
        return channels, _values(node.arg(2, "bias"))
    return None


def _values(item: object) -> list[Value]:
    return [item] if isinstance(item, Value) else []


def _parts(value: Value, axis: Axis, flow: Flow) -> Iterator[tuple[Value, NDArray[np.int64]]]:
    """Yield the consecutive or strided parts that a tensor is split into, with their rows."""
    for node in value.users:
        name = stem(node.op)
        axes = flow.of(value)
        if name in RENAMES:
            if any(a.find() is axis.find() for a in flow.of(node.out)):
                yield from _parts(node.out, axis, flow)
            continue
        if name not in ("split", "split_with_sizes", "chunk", "slice", "narrow"):
            continue
        dim = node.arg(1 if name in ("slice", "narrow") else 2, "dim", 0) % len(axes)
        if axes[dim].find() is not axis.find():
            continue
        start = 0
        for made in node.outputs:
            if made is None:
                continue
            size = made.shape[dim]
            if name == "slice":
                rows = np.arange(axis.size)[
                    node.arg(2, "start") : node.arg(3, "end") : node.arg(4, "step", 1)
                ]
            elif name == "narrow":
                rows = np.arange(node.args[2], node.args[2] + size)
            else:
                rows = np.arange(start, start + size)
                start += size
            yield made, rows


def _fold(candidate: _Source, absorbed: Absorbed, flow: Flow) -> Fold | None:
    if not absorbed.weights:
        return None
    biases = dict.fromkeys((*candidate.biases, *absorbed.biases))
    if not all(bias.stored and len(list(_reads(bias))) == 1 for bias in biases):
        return None
    for weight in absorbed.weights:
        if weight is candidate.weight or weight.kind != "parameter":
            return None
        if any(node not in absorbed.nodes for node, _ in _reads(weight)):
            return None
    code = _Code.of(candidate.axis)
    if code is None:
        return None
    scaled = [_member(candidate.weight, candidate.dim, code, candidate.axis, candidate.rows)]
    for bias in biases:
        at = [d for d, a in enumerate(flow.of(bias)) if a.size > 1]
        if len(at) != 1:
            return None
        own = flow.of(bias)[at[0]]
        whole = own.size == candidate.axis.size
        rows = None if whole else candidate.rows
        scaled.append(_member(bias, at[0], code, own if whole else candidate.axis, rows))
    divided = []
    for weight, axis in absorbed.weights.items():
        dims = [d for d, a in enumerate(flow.of(weight)) if a.find() is axis]
        if len(dims) != 1 and len(weight.shape) > 1 and dims[-1:] == [len(weight.shape) - 1]:
            dims = dims[-1:]  # a square weight: its input is the last dimension
        if len(dims) != 1:
            return None
        divided.append(_member(weight, dims[0], code, axis, None))
    if any(member is None for member in (*scaled, *divided)):
        return None
    consumers = tuple(dict.fromkeys(owner(weight.name) for weight in absorbed.weights))
    producer = owner(candidate.weight.name)
    return Fold(
        producer,
        candidate.weight.name.rpartition(".")[2],
        candidate.dim,
        consumers,
        f"what {producer} makes is read by {', '.join(consumers)} only, "
        "through operators that keep a positive scale",
        tuple(m for m in scaled if m is not None),
        tuple(m for m in divided if m is not None),
    )


@dataclass(frozen=True)
class _Code:
    """Numbers the joint coordinates of some leaves, so that dimensions can be matched.

    Attributes:
        weights: Leaf to its place value; a leaf that is absent counts as digit 0.
        values: The numbers of the scaled axis' coordinates, sorted.
        ranks: Their places along that axis.
    """

    weights: Mapping[Axis, int]
    values: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @classmethod
    def of(cls, axis: Axis) -> _Code | None:
        place, weights = 1, {}
        for leaf in dict.fromkeys(axis.leaves()):
            weights[leaf] = place
            place *= leaf.size + 1
            if place > _LARGEST:
                return None
        values, first = np.unique(_numbers(axis, weights), return_index=True)
        return cls(weights, values, np.argsort(np.argsort(first)))


def _numbers(axis: Axis, weights: Mapping[Axis, int]) -> NDArray[np.int64]:
    """Return the number of every position of a dimension."""
    axis = axis.find()
    if axis.kind is Kind.LEAF:
        if axis not in weights:
            return np.zeros(axis.size, dtype=np.int64)
        return (np.arange(axis.size, dtype=np.int64) + 1) * weights[axis]
    parts = [_numbers(part, weights) for part in axis.parts]
    if axis.kind is Kind.SUM:
        return np.concatenate(parts)
    found = parts[0]
    for part in parts[1:]:
        found = (found[:, None] + part[None, :]).ravel()
    return found


def _member(
    value: Value, dim: int, code: _Code, axis: Axis, rows: NDArray[np.int64] | None
) -> Member | None:
    """Return where the coordinates lie in a dimension; ``None`` where they do so unevenly."""
    numbers = _numbers(axis, code.weights)
    known = np.isin(numbers, code.values)
    if (numbers[~known] != 0).any():
        return None
    at = np.flatnonzero(known)
    ranks = code.ranks[np.searchsorted(code.values, numbers[at])]
    counts = np.bincount(ranks, minlength=code.values.size)
    if at.size == 0 or (counts != counts[0]).any():
        return None
    index = at[np.argsort(ranks, kind="stable")].reshape(code.values.size, -1)
    if rows is not None:
        index = rows[index]
    module, _, tensor = value.name.rpartition(".")
    return Member(module, tensor, dim, torch.from_numpy(np.ascontiguousarray(index)))
