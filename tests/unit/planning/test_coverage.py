"""Every module that holds weights is either quantized or skipped with a reason; bytes and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.planning import build_plan
from bittern.records import ModelAdapter, ModuleRule
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]


class Own(nn.Linear):
    """A linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.abs().T


class OwnAttention(nn.MultiheadAttention):
    """An attention that does something else."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args, **kwargs)


class Odd(nn.Module):
    """Weights in every place that is easily forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.ones(4))
        self.attention = OwnAttention(4, 2)
        self.own = Own(4, 4)
        self.fine = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.batch = nn.BatchNorm1d(4)
        self.recurrent = nn.LSTM(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.transposed = nn.ConvTranspose1d(4, 4, 3)
        self.act = nn.PReLU()
        self.drop = nn.Dropout()
        self.patched = nn.Linear(4, 4)
        self.patched.forward = lambda x: x  # type: ignore[method-assign]


class Container(nn.Module):
    """Matrices of its own, beside its children's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 4))
        self.listed = nn.ParameterList([nn.Parameter(torch.ones(4, 4)) for _ in range(4)])
        self.odd = Odd()


EVERYTHING = {"rules": [{"match": "*", "weight": "int8"}]}


def test_every_module_with_weights_is_quantized_or_skipped_with_a_reason(
    toolkit: Toolkit,
) -> None:
    model = Odd()
    plan = toolkit.plan(model, EVERYTHING)

    bearing = {
        name
        for name, m in model.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }
    assert set(plan.modules) | set(plan.skipped) == bearing
    assert not set(plan.modules) & set(plan.skipped)
    assert all(plan.skipped.values())
    assert plan.modules == ("fine", "recurrent", "bilinear", "transposed")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("", "no plugin has a rule for Odd"),
        ("attention", "OwnAttention overrides forward of MultiheadAttention"),
        ("attention.out_proj", "may read the weight without calling the layer"),
        ("own", "Own overrides forward of Linear"),
        ("norm", "a LayerNorm is quantized only where a recipe names it"),
        ("patched", "its forward was replaced on the object itself"),
    ],
)
def test_the_reason_says_why(module: str, reason: str, toolkit: Toolkit) -> None:
    assert reason in toolkit.plan(Odd(), EVERYTHING).skipped[module]


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "int4", "fp8", "fp8-dynamic"])
def test_with_a_shipped_recipe_lost_matrices_are_told_from_what_is_left_on_purpose(
    recipe: str, toolkit: Toolkit
) -> None:
    skipped = toolkit.plan(Container(), recipe).skipped
    unnamed = "no recipe rule names it"
    lost = f"{unnamed}, and no plugin has a rule for"
    assert skipped[""] == f"{lost} Container (which holds table)"
    assert skipped["listed"] == f"{lost} ParameterList (which holds 0, 1, 2, ...)"
    assert "OwnAttention overrides forward of MultiheadAttention" in skipped["odd.attention"]
    assert skipped["odd.own"].startswith("Own overrides forward of Linear, and its source does not")
    assert "a rule for tests.unit.planning.test_coverage:Own" in skipped["odd.own"]
    assert skipped["odd"] == skipped["odd.norm"] == skipped["odd.act"] == unnamed  # vectors
    assert skipped["odd.recurrent"] == unnamed  # another recipe could


def test_a_matrix_beside_the_slots_of_a_rule_is_reported(toolkit: Toolkit) -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora = nn.Parameter(torch.ones(4, 2))
            self.scale = nn.Parameter(torch.ones(4))

    plan = toolkit.plan(nn.Sequential(Adapted(), nn.Linear(4, 4)), "int8-weight-only")
    assert plan.modules == ("0", "1")
    assert plan.warnings == (
        "0.lora stays as it is: the rule of bittern for torch.nn.modules.linear:Linear has no "
        "slot for it",
    )


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("torch.nn:Linear", "the class is defined as 'torch.nn.modules.linear:Linear'"),
        ("torch.nn.modules.linear:Line", "torch.nn.modules.linear has no Line"),
    ],
)
def test_a_rule_that_can_match_nothing_is_reported_by_its_plugins_name(
    target: str,
    why: str,
    make_plugin: Callable[..., Any],
    toolkit_with: Callable[..., Toolkit],
    make_mlp: Make,
) -> None:
    rules = [
        ModuleRule(target=name, quantized="bittern.nn.linear:QuantLinear")
        for name in (target, "wing_not_installed:Linear")
    ]
    plugin = make_plugin("alpha", register_modules=lambda: rules)
    plan = toolkit_with(plugin).plan(make_mlp(), "int8-weight-only")
    assert plan.warnings == (
        f"the rule of bittern-alpha 1.0 for {target} matches nothing: {why}; the plugin and its "
        "framework do not fit, update one of them",
    )


def test_modules_that_no_rule_names_are_reported_too(toolkit: Toolkit) -> None:
    plan = toolkit.plan(Odd(), {"rules": [{"match": "fine", "weight": "int8"}]})

    assert plan.skipped["norm"] == plan.skipped[""] == "no recipe rule names it"
    assert "drop" not in plan.skipped


def test_an_attention_with_a_forward_of_its_own_still_computes_what_it_did(
    toolkit: Toolkit, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    model = nn.ModuleDict({"a": OwnAttention(4, 2), "b": nn.Linear(4, 4)}).eval()
    x = torch.randn(3, 1, 4)
    before = model["a"](x, x, x)[0]
    toolkit.quantize(model, EVERYTHING)

    assert same_bits(model["a"](x, x, x)[0], before)


# --- bits and bytes -------------------------------------------------------------------------------


def test_effective_bits_and_bytes_are_those_of_a_computation_by_hand(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(200, 10), nn.Linear(10, 6, bias=False), nn.LayerNorm(6))
    model.register_buffer("stay", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("gone", torch.zeros(99), persistent=False)
    int4 = {"match": "0", "weight": {"format": "int4", "size": 128}}
    int8 = {"match": "1", "weight": {"format": "int8", "granularity": "channel"}}
    plan = toolkit.plan(model, {"rules": [int4, int8]})

    first = 2000 * 4 + 10 * 2 * 32  # two groups of 128 per row, the second a partial one
    second = 60 * 8 + 6 * 32
    rest = 4 * (10 + 6 + 6) + 3 * 8
    assert plan.parameters == 2000 + 10 + 60 + 12
    assert plan.bytes_before == 4 * (2000 + 60) + rest
    assert plan.bytes_after == (first + second) // 8 + rest
    assert plan.effective_bits == pytest.approx((first + second) / 2060)


def test_codes_are_rounded_up_to_whole_bytes(toolkit: Toolkit) -> None:
    model = nn.Linear(3, 1, bias=False)
    rule = {"match": "*", "weight": {"format": "int4", "granularity": "tensor"}}
    plan = toolkit.plan(model, {"rules": [rule]})

    assert plan.bytes_after == 6  # 12 bits of codes, 32 of the scale


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_dtype_on_disk_counts(dtype: str | None, toolkit: Toolkit, make_mlp: Make) -> None:
    recipe = toolkit.recipe("int8-weight-only")
    plan = build_plan(make_mlp(), recipe, toolkit.registry, adapter=ModelAdapter(dtype=dtype))

    width = 4 if dtype is None else 2
    plain = 16 + 16 + 16 + 4
    assert plan.bytes_before == width * (8 * 16 + 16 * 4 + plain)
    assert plan.bytes_after == 8 * 16 + 16 * 4 + 4 * (16 + 4) + width * plain


@pytest.mark.parametrize(
    ("rules", "weight_bytes"),
    [
        ({}, 0),
        ({"embed": "int8", "head": "int8"}, 512 + 4),  # stored once
        ({"head": "int8"}, 2048 + 512 + 4),  # the embedding reads the original
        ({"embed": "int4", "head": "int8"}, 256 + 4 + 512 + 4),
    ],
)
def test_a_tied_weight_counts_once_per_way_it_is_stored(
    rules: dict[str, str], weight_bytes: int, toolkit: Toolkit, make_lm: Make
) -> None:
    model = make_lm(depth=1, tied=True)
    untied = sum(p.numel() for p in model.parameters()) * 4 - 2048
    one_more = {"match": "layers.0.q", "weight": {"format": "int8", "granularity": "tensor"}}
    listed: list[Any] = [
        {"match": name, "weight": {"format": f, "granularity": "tensor"}}
        for name, f in rules.items()
    ]
    plan = toolkit.plan(model, {"rules": [one_more, *listed]})

    q_before, q_after = 16 * 16 * 4, 16 * 16 + 4
    assert plan.bytes_before == untied + 2048
    assert plan.bytes_after == untied - q_before + q_after + (weight_bytes or 2048)


def test_a_module_under_two_names_counts_once(toolkit: Toolkit) -> None:
    shared = nn.Linear(8, 8, bias=False)
    model = nn.Sequential(shared, shared)
    rule = {"match": "*", "weight": {"format": "int8", "granularity": "tensor"}}
    plan = toolkit.plan(model, {"rules": [rule]})

    assert (plan.bytes_before, plan.bytes_after) == (256, 64 + 4)
    assert plan.parameters == 64


def test_a_plan_knows_whether_it_needs_data(toolkit: Toolkit, make_mlp: Make) -> None:
    needs = {
        name: toolkit.plan(make_mlp(), name).needs_data
        for name in ("int8", "fp8", "int8-weight-only", "int4", "fp8-dynamic")
    }

    assert needs == {
        "int8": True,
        "fp8": True,
        "int8-weight-only": False,
        "int4": False,
        "fp8-dynamic": False,
    }
