"""Everything that can be asked of a trace without knowing how it was made, as findings in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tracing_zoo.entry import Entry
from tracing_zoo.groups import missing, shapes_of
from tracing_zoo.physics import (
    SAME,
    GroupLike,
    Subject,
    forgotten,
    parts_of,
    permutation_error,
)
from tracing_zoo.removal import remove
from tracing_zoo.truths import FoldLike, fold_error, unexpected_shares

__all__ = ["Traced", "findings", "name_of"]

# What a physical test may raise when a group is wrong: shapes that do not fit, names that are not.
WRONG = (RuntimeError, ValueError, AssertionError, IndexError, AttributeError, TypeError, KeyError)


class Traced:
    """A model of the zoo with the trace of its twin in float32, as users trace it.

    Attributes:
        subject: The model, its calls and outputs, in float64.
        untouched: Whether the trace left the twin as it was.
        trace: What is to be judged.
        rigid: Whether nothing can be removed.
        removals: How removals were judged: ``equal``, or why they could not be.
    """

    def __init__(self, entry: Entry, tracer: Callable[[nn.Module, Mapping[str, Any]], Any]) -> None:
        example = entry.make()
        self.rigid = entry.rigid
        self.subject = Subject(example.model, example.inputs, example.others)
        twin = entry.make().model.float()
        before = _state(twin)
        self.trace = tracer(twin, {name: _narrow(x) for name, x in example.inputs.items()})
        self.untouched = before == _state(twin)
        self.removals: Counter[str] = Counter()


def name_of(group: GroupLike) -> str:
    """Return a group in a few words."""
    first = group.members[0]
    return f"group of {group.size} at {first.module}.{first.tensor} dim {first.dim}"


def findings(
    traced: Traced,
    *,
    expected: Sequence[GroupLike] | None = None,
    folds: set[tuple[str, frozenset[str]]] | None = None,
    fixed: frozenset[int] | None = None,
) -> list[str]:
    """Return what is wrong with a trace; with the groups and folds it has to have, if known.

    Args:
        traced: The model and its trace.
        expected: Groups it has to find.
        folds: Producers and consumers it has to find.
        fixed: Sizes of dimensions that are in no group; all others have to be in one.
    """
    found = [] if traced.untouched else ["the model is not as it was"]
    found += permutations(traced)
    found += removals(traced)
    found += shares(traced)
    found += scales(traced)
    model = traced.subject.model
    if expected is not None:
        found += missing(shapes_of(model, expected), shapes_of(model, traced.trace.groups))
    if fixed is not None:
        found += uncovered(traced, fixed)
    if folds is not None:
        mine = {(f.producer, frozenset(f.consumers)) for f in traced.trace.foldable}
        found += [f"no fold {_arrow(*fold)}" for fold in sorted(folds - mine, key=str)]
    return found


def permutations(traced: Traced) -> Iterator[str]:
    """Every sortable group may be permuted, and none of its members may stay behind."""
    for group in _groups(traced):
        if not group.sortable:
            continue
        try:
            error = permutation_error(traced.subject, group)
            if error > SAME:
                yield f"permute {name_of(group)}: the output changes by {error:.1e}"
                continue
            for member in forgotten(traced.subject, group):
                yield f"permute {name_of(group)}: nothing changes without {member}"
        except WRONG as error:
            yield f"permute {name_of(group)}: {_line(error)}"


def removals(traced: Traced) -> Iterator[str]:
    """Half of every group may be removed, and what is left computes as if it were zero."""
    groups = list(_groups(traced))
    for group in () if traced.rigid else groups:
        try:
            removal = remove(traced.subject, group, among=groups)
        except WRONG as error:
            yield f"remove {name_of(group)}: {_line(error)}"
            continue
        traced.removals.update(removal.why or ("equal",))
        if removal.error is not None and removal.error > SAME:
            yield f"remove {name_of(group)}: the output is off by {removal.error:.1e}"


def shares(traced: Traced) -> Iterator[str]:
    """The shared inputs are those that are shared in memory."""
    missed, invented = unexpected_shares(traced.subject, traced.trace.shared_inputs)
    yield from (f"not seen to read one tensor: {', '.join(sorted(paths))}" for paths in missed)
    yield from (f"do not read one tensor: {', '.join(sorted(paths))}" for paths in invented)


def scales(traced: Traced) -> Iterator[str]:
    """Every foldable scale can be folded."""
    for fold in traced.trace.foldable:
        try:
            error = fold_error(traced.subject, fold)
        except WRONG as problem:
            yield f"fold {_words(fold)}: {_line(problem)}"
            continue
        if error > SAME:
            yield f"fold {_words(fold)}: the output changes by {error:.1e}"


def uncovered(traced: Traced, fixed: frozenset[int]) -> Iterator[str]:
    """Every dimension of channels of every parameter is in a group, but for known sizes."""
    model = traced.subject.model
    parts = (part for group in traced.trace.groups for part in parts_of(model, group))
    covered = {(id(part.tensor), part.dim) for part in parts}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        shape = parameter.shape[:2] if isinstance(module, _ConvNd) else parameter.shape
        for dim, size in enumerate(shape):
            if (id(parameter), dim) not in covered and size not in fixed | {1}:
                yield f"in no group: {name} dim {dim}"


def _groups(traced: Traced) -> Iterator[GroupLike]:
    return (group for group in traced.trace.groups if group.size > 1)


def _words(fold: FoldLike) -> str:
    return _arrow(f"{fold.producer}.{fold.tensor} dim {fold.dim}", fold.consumers)


def _arrow(producer: str, consumers: Any) -> str:
    return f"{producer} -> {', '.join(sorted(consumers))}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _narrow(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _state(model: nn.Module) -> dict[str, Any]:
    """Return what a trace has to leave alone: values, modes, hooks, attributes, classes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found[path] = (type(module), module.training, hooks, frozenset(vars(module)))
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None:
                total = torch.hash_tensor(tensor).item() if tensor.numel() else 0
                found[f"{path}.{name}"] = (id(tensor), tensor.dtype, tensor.requires_grad, total)
    return found
