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
from tracing_zoo.following import HEAD_WIDTH, Cut
from tracing_zoo.physics import GroupLike, Subject, Tape, distance, parts_of, run

__all__ = ["Removal", "remove"]

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
        self.dim = 1 if isinstance(norm, CHANNELS_FIRST) else -1

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
    one direction of a recurrence as wide as the other. If nothing runs with one group cut, those of
    its size in the same modules (taken from ``among``) are cut too. If there is none, and the group
    is as large as a head is wide, then the class alone stands in the way.

    Raises:
        Exception: Whatever the smaller model raises, if its shapes do not fit.
    """
    try:
        return _remove(subject, [group], seed)
    except (RuntimeError, ValueError, AssertionError, IndexError):
        others = [g for g in among if _is_sibling(g, group)]
        if others:
            return _remove(subject, [group, *others], seed)
        if group.size in _head_widths(subject.model, group):
            return Removal(None, ("keys and values have one head width",))
        raise


def _remove(subject: Subject, groups: Sequence[GroupLike], seed: int) -> Removal:
    generator = Generator().manual_seed(seed)
    cuts = [(g, torch.randperm(g.size, generator=generator)[: g.size // 2]) for g in groups]
    small = Cut(subject.model, cuts)
    whole, without = _zeroed(subject.model, cuts, small)
    error = 0.0
    for call, expected in zip(subject.calls, subject.outputs, strict=True):
        tape = Tape()
        zeroed = run(whole, call, tape=tape)
        outputs = run(small.model, call, tape=tape.rewound())
        assert [t.shape for t in outputs] == [t.shape for t in expected], "the outputs shrank"
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


def _is_sibling(other: GroupLike, group: GroupLike) -> bool:
    if other is group or other.size != group.size:
        return False
    return bool(_neighbourhood(other) & _neighbourhood(group))


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
