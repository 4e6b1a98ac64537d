"""The removal test: what is left of a model computes what the whole one does with channels at zero.

Zero are the activations: every member's rows are zero, so nothing is written to the channels and
nothing is read from them. Where a norm computes statistics over the channels, zeros would count;
there the whole model gets norms that look at the other channels only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tracing_zoo.attention import unpack
from tracing_zoo.following import HEAD_WIDTH, MODES, Cut, Mode
from tracing_zoo.physics import SAME, GroupLike, Subject, Tape, distance, parts_of, run

__all__ = ["Removal", "remove"]

# What a model may raise when its shapes do not fit.
WRONG = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)
CHANNELS_FIRST = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Removal:
    """What came of a removal.

    Attributes:
        error: How far the outputs are from those with the channels at zero; ``None``: not compared.
        why: Why they were not compared: what normalises over the group, or why nothing could run.
        siblings: How many groups lost as many coordinates, because the model wants them equal.
    """

    error: float | None
    why: tuple[str, ...] = ()
    siblings: int = 0


class Masked(nn.Module):
    """A norm over the channels that are left; the others come out as zero."""

    def __init__(self, norm: nn.Module, kept: Tensor, width: int) -> None:
        super().__init__()
        self.norm, self.kept, self.width = norm, kept, width
        first = getattr(norm, "data_format", "channels_last") == "channels_first"
        self.dim = 1 if first or isinstance(norm, CHANNELS_FIRST) else -1
        self.weight = norm.weight  # some ask its dtype

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        given = [x.index_select(self.dim, self.kept) if self._is_wide(x) else x for x in inputs]
        out = self.norm(*given, **options)
        shape = list(out.shape)
        shape[self.dim] = self.width
        return out.new_zeros(shape).index_copy(self.dim, self.kept, out)

    def _is_wide(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[self.dim] == self.width


def remove(
    subject: Subject, group: GroupLike, *, among: Sequence[GroupLike] = (), seed: int = 0
) -> Removal:
    """Remove half of a group and compare with the whole model whose channels are zero.

    Some classes want two groups of one size, although nothing couples them: keys as wide as values,
    one direction of a recurrence as wide as the other. If nothing runs with one group cut, those
    that have to be as large (taken from ``among``) are cut too. If there are none, and the group is
    a part of every head, then the class alone stands in the way; so it does if it computes the
    scale of its attention from the width of its heads.

    Raises:
        Exception: Whatever the smaller model raises, if its shapes do not fit.
    """
    widths = _head_widths(subject.model, group)
    together = _with_siblings(group, among, widths)
    removal: Removal | None = None
    failure: Exception | None = None
    for groups in [[group], together] if len(together) > 1 else [[group]]:
        try:
            removal = _best(subject, groups, seed)
        except WRONG as error:
            failure = failure or error
        else:
            if removal.error is None or removal.error < SAME:
                return removal
    if any(_is_in_heads(group, width) for width in widths):
        return Removal(None, ("the heads of the class have one width, or it sets their scale",))
    if removal is None:
        assert failure is not None
        raise failure
    return removal


def _best(subject: Subject, groups: Sequence[GroupLike], seed: int) -> Removal:
    """Try which numbers of the modules have to follow; only running shows."""
    found: list[Removal] = []
    failures: list[Exception] = []
    for mode in MODES:
        try:
            found.append(_remove(subject, groups, seed, mode))
        except WRONG as error:
            failures.append(error)
        else:
            if found[-1].error is None or found[-1].error < SAME:
                return found[-1]
    if not found:
        raise failures[0]
    return found[0]


def _remove(subject: Subject, groups: Sequence[GroupLike], seed: int, mode: Mode) -> Removal:
    generator = Generator().manual_seed(seed)
    unit = min(group.size for group in groups)
    cuts = [
        (g, torch.randperm(g.size, generator=generator)[: unit // 2 * (g.size // unit)])
        for g in groups
    ]
    small = Cut(subject.model, cuts, mode)
    whole, without = _zeroed(subject.model, cuts, small)
    error = 0.0
    for call, expected in zip(subject.calls, subject.outputs, strict=True):
        tape = Tape()
        zeroed = run(whole, call, tape=tape)
        outputs = run(small.model, call, tape=tape.rewound())
        assert [t.shape for t in outputs] == [t.shape for t in expected], "the outputs shrank"
        if not all(t.isfinite().all() for t in zeroed):
            without = (*without, "what computes a weight out of zeros")
        error = max(error, 0.0 if without else distance(zeroed, outputs))
    return Removal(None if without else error, without, len(groups) - 1)


def _zeroed(
    model: nn.Module, cuts: Sequence[tuple[GroupLike, Tensor]], small: Cut
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the whole model with the channels at zero, and the norms that have no oracle."""
    whole = unpack(copy.deepcopy(model))
    with torch.no_grad():
        for group, gone in cuts:
            for part in parts_of(whole, group):
                part.tensor.index_fill_(part.dim, part.index[gone].flatten(), 0.0)
    modules = dict(whole.named_modules(remove_duplicate=False))
    without = []
    for name in dict.fromkeys(name for group, _ in cuts for name in group.normalized_by):
        rows = small.kept.get(f"{name}.weight", {}).get(0)
        if name not in modules or rows is None:
            without.append(name)
            continue
        width = len(model.get_submodule(name).weight)
        whole.set_submodule(name, Masked(small.model.get_submodule(name), rows, width))
    return whole, tuple(without)


def _with_siblings(
    group: GroupLike, among: Sequence[GroupLike], widths: set[int]
) -> list[GroupLike]:
    """Return a group and those that have to lose as large a part, over however many steps.

    They are of one size and in the same modules; or they are other slices of one dimension (that a
    model splits into halves, say); or, as a rotation has one angle for two coordinates of a head,
    a part of a head is as large as theirs. The smallest comes first.
    """
    found = [group]
    grown = True
    while grown:
        grown = False
        for other in among:
            if all(other is not g for g in found) and any(_belong(other, g, widths) for g in found):
                found.append(other)
                grown = True
    return sorted(found, key=lambda g: g.size)


def _belong(one: GroupLike, other: GroupLike, widths: set[int]) -> bool:
    large, small = max(one.size, other.size), min(one.size, other.size)
    if large % small:
        return False
    near = bool(_neighbourhood(one) & _neighbourhood(other))
    return _are_slices(one, other) or (near and (large == small or large in widths))


def _are_slices(one: GroupLike, other: GroupLike) -> bool:
    rows = {(m.module, m.tensor, m.dim): set(m.index.flatten().tolist()) for m in one.members}
    return any(
        not rows[key] & set(member.index.flatten().tolist())
        for member in other.members
        if (key := (member.module, member.tensor, member.dim)) in rows
    )


def _is_in_heads(group: GroupLike, width: int) -> bool:
    """Say whether a coordinate is one place, or a rotated pair of places, in each head."""
    places = [{int(i) % width for i in member.index[0].tolist()} for member in group.members]
    return group.size <= width and any(
        len(p) <= 2 < len(m.index[0]) for p, m in zip(places, group.members, strict=True)
    )


def _neighbourhood(group: GroupLike) -> set[str]:
    """Return the modules that own members, and the modules these are in."""
    owners = {member.module for member in group.members}
    return owners | {path.rpartition(".")[0] for path in owners if "." in path}


def _head_widths(model: nn.Module, group: GroupLike) -> set[int]:
    return {
        value
        for path in _neighbourhood(group)
        for name, value in vars(model.get_submodule(path)).items()
        if HEAD_WIDTH.search(name) and isinstance(value, int)
    }
