"""The recipes that ship with core."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from bittern.errors import RecipeError
from bittern.toolkit import Toolkit

EXPECTED = {
    "fp8": {"weight": "fp8/tensor", "input": "fp8/tensor"},
    "fp8-dynamic": {"weight": "fp8/channel", "input": "fp8/token/dynamic"},
    "fp8-block": {"weight": "fp8/block[128x128]", "input": "fp8/group[128]/dynamic"},
    "int4": {"weight": "int4/group[128]"},
    "int4-hqq": {"weight": "int4-asym/group[64]"},
    "int4-gptq": {"weight": "int4/group[128]"},
    "int4-awq": {"weight": "int4/group[128]"},
    "int8": {"weight": "int8/channel", "input": "int8/tensor"},
    "int8-cnn": {"weight": "int8/channel", "input": "int8/tensor"},
    "int8-smoothquant": {"weight": "int8/channel", "input": "int8/token/dynamic"},
    "int8-weight-only": {"weight": "int8/channel"},
    "int4-best": {"weight": "int4/group[128]"},
    "mxfp4-best": {"weight": "mxfp4/group[32]", "input": "mxfp4/group[32]/dynamic"},
    "nvfp4-best": {"weight": "nvfp4/group[16]", "input": "nvfp4/group[16]"},
    "nvfp4a16-best": {"weight": "nvfp4/group[16]"},
    "mxfp4": {"weight": "mxfp4/group[32]", "input": "mxfp4/group[32]/dynamic"},
    "mxfp6": {"weight": "mxfp6/group[32]", "input": "mxfp6/group[32]/dynamic"},
    "mxfp8": {"weight": "mxfp8/group[32]", "input": "mxfp8/group[32]/dynamic"},
    "mxint8": {"weight": "mxint8/group[32]", "input": "mxint8/group[32]/dynamic"},
    "nf4": {"weight": "nf4/group[64]"},
    "nvfp4": {"weight": "nvfp4/group[16]", "input": "nvfp4/group[16]"},
    "nvfp4-gptq": {"weight": "nvfp4/group[16]", "input": "nvfp4/group[16]"},
    "nvfp4-awq": {"weight": "nvfp4/group[16]", "input": "nvfp4/group[16]"},
    "nvfp4-svdquant": {"weight": "nvfp4/group[16]", "input": "nvfp4/group[16]"},
    "nvfp4a16": {"weight": "nvfp4/group[16]"},
    "w4a8-awq": {"weight": "int4/group[128] > fp8/tensor", "input": "fp8/tensor"},
    "w4a8": {"weight": "int4/group[128] > fp8/tensor", "input": "fp8/tensor"},
}


def test_every_shipped_recipe_is_covered_here(toolkit: Toolkit) -> None:
    assert sorted(toolkit.registry.recipes) == sorted([*EXPECTED, "base"])


@pytest.mark.parametrize("name", [*EXPECTED, "base"])
def test_a_shipped_recipe_is_valid_and_describes_itself(name: str, toolkit: Toolkit) -> None:
    recipe = toolkit.recipe(name)

    assert recipe.name == name
    assert recipe.description == toolkit.registry.recipes.get(name).description
    assert recipe.algorithm[-1].name not in {"smooth", "equalize", "fold-batchnorm"}  # sets ranges
    assert "head" in recipe.skip[0].role


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_does_what_it_says(
    name: str, toolkit: Toolkit, make_mlp: Callable[..., nn.Module]
) -> None:
    plan = toolkit.plan(make_mlp(), name)

    assert plan.recipe == name
    assert plan.modules == ("up", "down")
    assert {e.slot: str(e.spec) for e in plan.entries} == EXPECTED[name]


def test_an_unknown_recipe_names_the_nearest(toolkit: Toolkit) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'int8-weigth-only'") as caught:
        toolkit.recipe("int8-weigth-only")
    assert "did you mean 'int8-weight-only'?" in (caught.value.hint or "")
