"""What is asked of a trace: a right one gives no findings, a wrong one says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from tracing_zoo import ZOO
from tracing_zoo.checks import Traced, findings
from tracing_zoo.expected import EXPECTED
from tracing_zoo.groups import Axis, AxisMember

ENTRY = next(entry for entry in ZOO if entry.name == "repeated")
SHARES = (
    ("attention.0.q", "attention.0.k", "attention.0.v"),
    ("mlp.0.gate", "mlp.0.up"),
)


@dataclass(frozen=True)
class Scale:
    """A fold, as the trace has them."""

    producer: str
    consumers: tuple[str, ...]
    tensor: str = "weight"
    dim: int = 0
    scaled: tuple[AxisMember, ...] = ()
    divided: tuple[AxisMember, ...] = ()


@dataclass(frozen=True)
class Trace:
    """What a tracer returns, as far as it is judged."""

    groups: Sequence[Axis]
    shared_inputs: tuple[tuple[str, ...], ...] = SHARES
    foldable: tuple[Scale, ...] = ()


def judged(trace: Trace, **known: Any) -> list[str]:
    return findings(Traced(ENTRY, lambda model, inputs: trace), **known)


@pytest.fixture(scope="module")
def groups() -> list[Axis]:
    return EXPECTED["repeated"]()


def ffn(groups: list[Axis]) -> Axis:
    return next(group for group in groups if group.size == 22)


def rest(groups: list[Axis]) -> list[Axis]:
    return [group for group in groups if group.size != 22]


def test_a_right_trace_gives_no_findings(groups: list[Axis]) -> None:
    fold = Scale("norm2.0", ("mlp.0.gate", "mlp.0.up"))
    known = {(fold.producer, frozenset(fold.consumers))}
    trace = Trace(groups, foldable=(fold,))
    assert not judged(trace, expected=groups, folds=known, fixed=frozenset({37}))


def test_a_wrong_group_is_found_by_both_tests(groups: list[Axis]) -> None:
    wrong = replace(ffn(groups), members=ffn(groups).members[:-1])
    permuted, removed = judged(Trace([*rest(groups), wrong]))
    assert permuted.startswith("permute group of 22 at mlp.0.gate.weight dim 0: the output changes")
    assert removed.startswith("remove group of 22 at mlp.0.gate.weight dim 0: RuntimeError: mat1")


def test_what_may_not_be_sorted_is_not_permuted(groups: list[Axis]) -> None:
    flipped = [replace(m, index=m.index.roll(i, 0)) for i, m in enumerate(ffn(groups).members)]
    wrong = replace(ffn(groups), members=tuple(flipped), sortable=False)
    assert [line.partition(":")[0] for line in judged(Trace([wrong]))] == [
        "remove group of 22 at mlp.0.gate.weight dim 0"
    ]


def test_a_stranger_in_a_group_is_told(groups: list[Axis]) -> None:
    one, two = (g for g in groups if g.size in {5, 7})
    both = replace(one, members=(*one.members, *two.members), size=5)
    assert "7 rows of 5" in judged(Trace([both]))[0]


def test_missing_groups_folds_and_dimensions_are_told(groups: list[Axis]) -> None:
    known = {("norm", frozenset({"head"}))}
    found = judged(Trace(rest(groups)), expected=groups, folds=known, fixed=frozenset({37}))
    assert found[0].startswith("no group of 22: mlp.0.down.weight dim 1 (1 a piece)")
    assert "in no group: mlp.0.down.weight dim 1" in found
    assert found[-1] == "no fold norm -> head"


def test_missed_and_invented_shares_are_told(groups: list[Axis]) -> None:
    shares = (SHARES[0], ("mlp.0.down", "head"))
    assert judged(Trace(groups, shared_inputs=shares)) == [
        "not seen to read one tensor: mlp.0.gate, mlp.0.up",
        "do not read one tensor: head, mlp.0.down",
    ]


def test_a_wrong_fold_is_told(groups: list[Axis]) -> None:
    columns = AxisMember("mlp.0.down", "weight", 1, torch.arange(22)[:, None])
    rows = [AxisMember("mlp.0.up", t, 0, torch.arange(22)[:, None]) for t in ("weight", "bias")]
    right = Scale("mlp.0.up", ("mlp.0.down",), scaled=tuple(rows), divided=(columns,))
    assert not judged(Trace(groups, foldable=(right,)))
    (found,) = judged(Trace(groups, foldable=(replace(right, scaled=(rows[0],)),)))
    assert found.startswith("fold mlp.0.up.weight dim 0 -> mlp.0.down: the output changes by")


@pytest.mark.parametrize(
    "touch",
    [
        lambda model: model.train(),
        lambda model: model.head.weight.data.mul_(2),
        lambda model: model.head.register_forward_hook(lambda *_: None),
        lambda model: setattr(model, "seen", True),
        lambda model: setattr(model.head, "weight", nn.Parameter(model.head.weight)),
        lambda model: model.requires_grad_(requires_grad=False),
    ],
)
def test_a_tracer_that_leaves_something_behind_is_told(groups: list[Axis], touch: Any) -> None:
    def tracer(model: nn.Module, inputs: object) -> Trace:
        touch(model)
        return Trace(groups)

    assert findings(Traced(ENTRY, tracer)) == ["the model is not as it was"]
