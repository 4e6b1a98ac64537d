"""From what a recipe says about a slot to a whole spec: defaults, and what is impossible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from bittern.config import SpecModel
from bittern.errors import RecipeError
from bittern.planning.specs import resolve_spec
from bittern.records import (
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Slot,
)
from bittern.registry import NamedTable
from bittern.toolkit import Toolkit

WEIGHT = Slot("weight", kind="weight", tensor="weight", channel_axis=1)
INPUT = Slot("input", channel_axis=-1)


@pytest.fixture
def resolve(toolkit: Toolkit) -> Callable[..., QuantizerSpec]:
    def make(slot: Slot, **said: Any) -> QuantizerSpec:
        model = SpecModel.model_validate({"format": "int8", **said})
        return resolve_spec(model, slot, toolkit.registry.formats, where="rule 0")

    return make


@pytest.mark.parametrize(
    ("slot", "said", "granularity", "dynamic"),
    [
        (WEIGHT, {}, PerChannel(1), False),  # int8's own, on the slot's axis
        (INPUT, {}, PerTensor(), False),
        (WEIGHT, {"format": "int4"}, PerGroup(128), False),
        (WEIGHT, {"format": "fp8"}, PerTensor(), False),
        (WEIGHT, {"granularity": "tensor"}, PerTensor(), False),
        (WEIGHT, {"granularity": "channel"}, PerChannel(1), False),
        (WEIGHT, {"granularity": "channel", "axis": 0}, PerChannel(0), False),
        (WEIGHT, {"granularity": "group", "size": 32}, PerGroup(32), False),
        (WEIGHT, {"size": 32}, PerGroup(32), False),
        (WEIGHT, {"format": "int4", "granularity": "group"}, PerGroup(128), False),
        (WEIGHT, {"granularity": "block", "rows": 2, "cols": 3}, PerBlock(2, 3), False),
        (WEIGHT, {"rows": 2, "cols": 3}, PerBlock(2, 3), False),
        (WEIGHT, {"dynamic": False}, PerChannel(1), False),
        (INPUT, {"granularity": "channel"}, PerChannel(-1), False),
        (INPUT, {"granularity": "token"}, PerToken(), True),
        (INPUT, {"granularity": "group", "size": 4}, PerGroup(4), True),
        (INPUT, {"rows": 2, "cols": 2}, PerBlock(2, 2), True),
        (INPUT, {"dynamic": True}, PerTensor(), True),
        (INPUT, {"granularity": "token", "dynamic": True}, PerToken(), True),
    ],
    ids=str,
)
def test_a_spec_is_filled_in(
    slot: Slot,
    said: dict[str, Any],
    granularity: object,
    resolve: Callable[..., QuantizerSpec],
    *,
    dynamic: bool,
) -> None:
    spec = resolve(slot, **said)

    assert (spec.granularity, spec.dynamic) == (granularity, dynamic)
    assert spec.format.name == said.get("format", "int8")


@pytest.mark.parametrize(
    ("slot", "said", "message"),
    [
        (WEIGHT, {"dynamic": True}, "weights are static"),
        (WEIGHT, {"granularity": "token"}, "a weight has no tokens"),
        (WEIGHT, {"granularity": "group"}, "group needs a size"),
        (INPUT, {"granularity": "token", "dynamic": False}, "static scales per token"),
        (INPUT, {"size": 8, "dynamic": False}, r"static scales per group\[8\]"),
        (INPUT, {"rows": 8, "cols": 8, "dynamic": False}, r"static scales per block\[8x8\]"),
    ],
    ids=str,
)
def test_what_is_impossible_is_refused(
    slot: Slot, said: dict[str, Any], message: str, resolve: Callable[..., QuantizerSpec]
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(slot, **said)
    assert caught.value.where == "rule 0"
    assert caught.value.hint


def test_a_formats_own_input_granularity_is_taken_when_the_recipe_says_none() -> None:
    mx = NumberFormat(
        name="mx",
        bits=8,
        codec="bittern.numerics.integers:IntCodec",
        params={"bits": 8},
        input_granularity=PerGroup(32),
        weight_granularity=PerGroup(32),
    )
    table = NamedTable("format", [(mx, "p 1", False)], error=RecipeError)

    for slot, dynamic in ((INPUT, True), (WEIGHT, False)):
        spec = resolve_spec(SpecModel(format="mx"), slot, table, where="rule 0")
        assert spec == QuantizerSpec(mx, PerGroup(32), dynamic)


@pytest.mark.parametrize("axis", [2, 5, -3])
def test_an_axis_that_the_weight_does_not_have_is_a_recipe_error(
    axis: int, toolkit: Toolkit
) -> None:
    weight = {"format": "int8", "granularity": "channel", "axis": axis}
    with pytest.raises(RecipeError, match=r"0\.weight: a tensor with 2 dimensions") as caught:
        toolkit.plan(nn.Sequential(nn.Linear(4, 4)), {"rules": [{"match": "0", "weight": weight}]})
    assert caught.value.where == "rule 0: 0"


def test_specs_name_themselves(make_spec: Callable[..., QuantizerSpec]) -> None:
    assert str(make_spec("int8", PerGroup(4))) == "int8/group[4]"
    assert str(make_spec("int8", PerToken(), dynamic=True)) == "int8/token/dynamic"
