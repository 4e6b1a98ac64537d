"""The physical tests themselves: right groups pass them, wrong ones do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from tracing_zoo import ZOO
from tracing_zoo.expected import EXPECTED
from tracing_zoo.groups import Axis, AxisMember, at, axis, missing, shapes_of, whole
from tracing_zoo.physics import SAME, Subject, forgotten, parts_of, permutation_error
from tracing_zoo.removal import Removal, remove
from tracing_zoo.truths import fold_error, shared_inputs, unexpected_shares

ENTRIES = {entry.name: entry for entry in ZOO}


@dataclass(frozen=True)
class Scale:
    """A fold, as the trace has them."""

    producer: str
    consumers: tuple[str, ...]
    tensor: str = "weight"
    dim: int = 0


@cache
def subject(name: str) -> Subject:
    example = ENTRIES[name].make()
    return Subject(example.model, example.inputs, example.others)


def group(name: str, tensor: str, size: int) -> Axis:
    """The first expected group of ``size`` that has a member in ``tensor``."""
    found = [g for g in EXPECTED[name]() if g.size == size]
    return next(g for g in found if tensor in {f"{m.module}.{m.tensor}" for m in g.members})


def without(group: Axis, name: str, dim: int) -> Axis:
    members = [m for m in group.members if (f"{m.module}.{m.tensor}", m.dim) != (name, dim)]
    assert len(members) == len(group.members) - 1
    return replace(group, members=tuple(members))


def with_index(group: Axis, name: str, change: object) -> Axis:
    members = [
        replace(m, index=change(m.index)) if f"{m.module}.{m.tensor}" == name else m
        for m in group.members
    ]
    return replace(group, members=tuple(members))


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_a_model_is_the_same_each_time_and_depends_on_its_input(entry: object) -> None:
    one, two = entry.make(), entry.make()
    first, second = Subject(one.model, one.inputs, one.others), Subject(two.model, two.inputs)
    assert torch.equal(first.outputs[0][0], second.outputs[0][0])
    assert not torch.allclose(first.outputs[0][0], first.outputs[1][0], rtol=1e-3)


# --- right groups ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_right_groups_are_right(name: str) -> None:
    it, groups = subject(name), EXPECTED[name]()
    for g in groups:
        assert permutation_error(it, g) < SAME
        assert not forgotten(it, g)
        removal = remove(it, g, among=groups)
        assert removal.error is not None
        assert removal.error < SAME


def test_a_test_leaves_the_model_as_it_was() -> None:
    example = ENTRIES["fused"].make()
    before = {name: t.clone() for name, t in example.model.state_dict().items()}
    it = Subject(example.model, example.inputs)
    groups = EXPECTED["fused"]()
    for g in groups:
        permutation_error(it, g)
        forgotten(it, g)
        remove(it, g, among=groups)
    after = example.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_norms_over_the_group_look_at_what_is_left() -> None:
    g = group("decoder", "embed.weight", 18)
    assert remove(subject("decoder"), g).error < SAME
    assert remove(subject("decoder"), replace(g, normalized_by=())).error > SAME


def test_what_has_no_oracle_is_said_and_not_compared() -> None:
    g = replace(group("decoder", "embed.weight", 18), normalized_by=("norm", "softmax in mlp"))
    assert remove(subject("decoder"), g) == Removal(None, ("softmax in mlp",), 0)


def test_groups_that_a_class_wants_equal_are_removed_together() -> None:
    """A view of 3 x heads x size wants one size for q, k and v; here they are two groups."""
    whole = next(g for g in EXPECTED["fused"]() if g.size == 6)
    first, second = _without_value(whole), _value_only(whole)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        remove(subject("fused"), first, among=[first])
    assert remove(subject("fused"), first, among=[first, second]).siblings == 1


def _without_value(group: Axis) -> Axis:
    members = [m for m in group.members if m.module == "qkv"]
    return replace(group, members=tuple(replace(m, index=m.index[:, :8]) for m in members))


def _value_only(group: Axis) -> Axis:
    own = [replace(m, index=m.index[:, 8:]) if m.module == "qkv" else m for m in group.members]
    return replace(group, members=tuple(own))


# --- wrong groups ---------------------------------------------------------------------------------


WRONG = [
    ("resnet", "block2.conv1.weight", 12, "block2.bn1.running_var", 0),
    ("resnet", "stem.0.weight", 8, "block2.down.0.weight", 1),
    ("decoder", "attention.0.q.weight", 4, "attention.0.v.bias", 0),
    ("decoder", "attention.0.q.weight", 3, "attention.0.o.weight", 1),
    ("decoder", "embed.weight", 18, "norm2.1.bias", 0),
    ("twice", "inp.weight", 10, "again.weight", 1),
    ("lstm", "first.weight_ih_l0", 14, "first.weight_hh_l0", 1),
]


@pytest.mark.parametrize(("name", "tensor", "size", "member", "dim"), WRONG)
def test_a_missing_member_is_caught(
    name: str, tensor: str, size: int, member: str, dim: int
) -> None:
    wrong = without(group(name, tensor, size), member, dim)
    assert permutation_error(subject(name), wrong) > SAME
    with pytest.raises((RuntimeError, ValueError)):
        remove(subject(name), wrong)


def test_another_order_of_rows_is_caught() -> None:
    right = group("decoder", "attention.0.q.weight", 4)
    wrong = with_index(right, "attention.0.q.weight", lambda index: index.flip(0))
    assert permutation_error(subject("decoder"), wrong) > SAME
    assert remove(subject("decoder"), wrong).error > SAME


def test_another_order_within_the_rows_of_a_coordinate_is_caught() -> None:
    right = group("decoder", "attention.0.q.weight", 4)
    flip = torch.arange(15).flip(0)
    wrong = with_index(
        right,
        "attention.0.q.weight",
        lambda index: torch.where(torch.arange(4)[:, None] < 2, index[:, flip], index),
    )
    assert permutation_error(subject("decoder"), wrong) > SAME


def test_a_missing_row_is_caught() -> None:
    right = group("fused", "gate_up.weight", 22)
    wrong = with_index(right, "gate_up.weight", lambda index: index[:, :1])
    assert permutation_error(subject("fused"), wrong) > SAME
    with pytest.raises((RuntimeError, ValueError)):
        remove(subject("fused"), wrong)


def test_a_part_of_the_coordinates_is_caught() -> None:
    """Half of the channels are a set that can be permuted, but the group is not all of them."""
    right = group("decoder", "mlp.0.up.weight", 22)
    half = replace(
        right,
        size=11,
        members=tuple(replace(m, index=m.index[:11]) for m in right.members),
    )
    it = subject("decoder")
    assert permutation_error(it, half) < SAME
    assert missing(shapes_of(it.model, [right]), shapes_of(it.model, [half]))


def test_a_stranger_is_caught() -> None:
    right = group("decoder", "mlp.0.up.weight", 22)
    stranger = AxisMember("mlp.1.up", "weight", 0, torch.arange(22)[:, None])
    wrong = replace(right, members=(*right.members, stranger))
    assert permutation_error(subject("decoder"), wrong) > SAME


def test_an_innocent_stranger_is_caught() -> None:
    """Two groups taken for one: both may be permuted alike, but either could stay behind."""
    first, second = (
        g for g in EXPECTED["decoder"]() if g.size == 3 and g.members[0].tensor == "weight"
    )
    both = replace(first, members=first.members + second.members)
    assert permutation_error(subject("decoder"), both) < SAME
    joined = shapes_of(subject("decoder").model, [both])
    assert missing(shapes_of(subject("decoder").model, [first, second]), joined)


@pytest.mark.parametrize("index", [[[0], [0]], [[0], [99]], [[0]], [[-1], [0]]])
def test_a_malformed_index_is_caught(index: list[list[int]]) -> None:
    member = AxisMember("again", "weight", 0, torch.tensor(index))
    with pytest.raises(AssertionError, match=r"again\.weight"):
        parts_of(subject("twice").model, Axis(2, (member,)))


def test_only_what_has_no_influence_may_stay_behind() -> None:
    """The bias of the keys shifts all logits of a query alike, so a softmax does not see it."""
    it, heads = subject("decoder"), group("decoder", "attention.0.q.weight", 4)
    assert permutation_error(it, without(heads, "attention.0.k.bias", 0)) < SAME
    assert not forgotten(it, heads)


def test_tied_parameters_are_one() -> None:
    it, g = subject("tied"), group("tied", "embed.weight", 18)
    tied = AxisMember("head", "weight", 1, torch.arange(18)[:, None])
    both = replace(g, members=(*g.members, tied))
    assert len(parts_of(it.model, both)) == len(parts_of(it.model, g))
    assert permutation_error(it, both) < SAME
    assert not forgotten(it, both)


# --- shared inputs and folds ----------------------------------------------------------------------


def test_shared_inputs_are_those_in_memory() -> None:
    assert shared_inputs(subject("inception")) == {
        frozenset({"one.0", "three.0.0"}),
        frozenset({"left.0", "right.0"}),
    }
    assert shared_inputs(subject("shared")) == {frozenset({"left", "right"})}


def test_missed_and_invented_shares_are_told_apart() -> None:
    claimed = [("attention.0.q", "attention.0.k"), ("mlp.0.gate", "mlp.0.up", "mlp.0.experts.w")]
    missed, invented = unexpected_shares(subject("repeated"), claimed)
    assert missed == {frozenset(f"attention.0.{p}" for p in "qkv")}
    assert invented == {frozenset({"attention.0.q", "attention.0.k"})}


RIGHT = [
    ("decoder", Scale("norm1.0", ("attention.0.q", "attention.0.k", "attention.0.v"))),
    ("decoder", Scale("norm2.1", ("mlp.1.gate", "mlp.1.up"))),
    ("decoder", Scale("mlp.0.up", ("mlp.0.down",))),
    ("decoder", Scale("attention.0.v", ("attention.0.o",))),
    ("resnet", Scale("block1.bn1", ("block1.conv2",))),
    ("flattened", Scale("0", ("4",))),
]


@pytest.mark.parametrize(("name", "fold"), RIGHT)
def test_right_folds_change_nothing(name: str, fold: Scale) -> None:
    assert fold_error(subject(name), fold) < SAME


@pytest.mark.parametrize(
    ("name", "fold"),
    [
        ("decoder", Scale("norm1.0", ("attention.0.q", "attention.0.k"))),
        ("decoder", Scale("mlp.0.gate", ("mlp.0.down",))),
        ("mobilenet_v2", Scale("1.expand.1", ("1.depthwise.0",))),
        ("fused", Scale("norm2", ("qkv",))),
    ],
)
def test_wrong_folds_change_the_output(name: str, fold: Scale) -> None:
    assert fold_error(subject(name), fold) > SAME


def test_a_depthwise_consumer_is_divided_by_channel() -> None:
    """ReLU6 cannot be folded through, so this one is built for it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 1), torch.nn.ReLU(), torch.nn.Conv2d(6, 12, 3, groups=6)
    ).double()
    it = Subject(model, {"input": torch.randn(2, 3, 5, 5, dtype=torch.float64)})
    assert fold_error(it, Scale("0", ("2",))) < SAME


# --- comparison -----------------------------------------------------------------------------------


def test_groups_are_compared_by_tensor_dimension_and_rows() -> None:
    model = subject("tied").model
    one = axis(18, whole("embed.weight:1"))
    other = axis(18, whole("head.weight:1"))
    assert shapes_of(model, [one]) == shapes_of(model, [other])
    assert not missing(shapes_of(model, [one]), shapes_of(model, [other]))


def test_what_is_missing_is_said_in_words() -> None:
    model = subject("fused").model
    slices = [at("gate_up.weight", 0, start=s) for s in (0, 22)]
    right = axis(22, [*slices, at("down.weight", 1)])
    assert missing(shapes_of(model, [right]), shapes_of(model, [axis(22, slices)])) == [
        "group of 22, found as 22: lacks down.weight dim 1 (1 a piece); has too much: nothing"
    ]
    assert missing(shapes_of(model, [axis(22, slices)]), shapes_of(model, [])) == [
        "no group of 22: gate_up.weight dim 0 (2 a piece)"
    ]
