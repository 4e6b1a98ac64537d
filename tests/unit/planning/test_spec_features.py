"""What a recipe's slot may say beyond format and granularity, from the recipe to saved state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.errors import BitternError, RecipeError
from bittern.nn import named_quantizers
from bittern.records import Affine, KernelRule, PerChannel, PerGroup, Rotation
from bittern.toolkit import Toolkit


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 64, generator=generator) for _ in range(3)]


def recipe(**slots: Any) -> dict[str, Any]:
    return {"rules": [{"match": {"class": "Linear"}, **slots}]}


EVERY = {
    "options": recipe(weight={"format": "int8", "options": {"narrow": True}}),
    "asymmetric": recipe(
        weight={"format": "int4", "granularity": "channel", "options": {"asymmetric": True}},
        input={"format": "int8-asym", "granularity": "tensor"},
    ),
    "chain": recipe(weight=["int4", {"format": "fp8", "granularity": "tensor"}], input="fp8"),
    "rotated": recipe(
        weight={"format": "int4", "size": 16, "rotate": "hadamard"},
        input={"format": "int8", "granularity": "token", "rotate": "hadamard"},
    ),
    "rotated back": recipe(weight={"format": "int4", "size": 16, "rotate": {"back": True}}),
    "affine": recipe(
        weight="int8", input={"format": "int8", "granularity": "tensor", "affine": {"axes": [-1]}}
    ),
    "affine mid dynamic": recipe(
        weight="int8",
        input={"format": "fp8", "granularity": "tensor", "affine": {"method": "mid", "dynamic": 1}},
    ),
    "given": recipe(weight="fp8", input={"format": "fp8", "amax": 448}),
    "two levels": recipe(weight="nvfp4", input="nvfp4"),
    "two levels, dynamic": recipe(weight="nvfp4", input={"format": "nvfp4", "dynamic": True}),
    "fitted": recipe(weight="nvfp4-four-over-six", input="mxfp8"),
    "mx": recipe(weight={"format": "mxfp4", "options": {"scale_rounding": "mse"}}, input="mxfp8"),
}


@pytest.mark.parametrize("name", EVERY)
def test_it_is_quantized_saved_and_restored_to_the_same_bits(name: str, tmp_path: Path) -> None:
    original, data = model(), batches()
    expected = original(data[0]).detach()
    result = bt.quantize(original, EVERY[name], data=data)
    found = original(data[0]).detach()
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.25

    bt.save(original, tmp_path / "state")
    fresh = model()
    bt.restore(fresh, tmp_path / "state")
    assert torch.equal(fresh(data[0]), found)
    assert [str(q.spec) for _, q in named_quantizers(fresh)] == [
        str(q.spec) for _, q in named_quantizers(original)
    ]
    assert str(result.plan.entries[0].spec)


def test_every_word_of_a_spec_arrives(
    make_plugin: Callable[..., Any], toolkit_with: Callable[..., Toolkit]
) -> None:
    kernel = KernelRule(
        op="fake_quantize", impl="nowhere:kernel", device="*", formats=("*",), backend="mine"
    )
    toolkit = toolkit_with(make_plugin("fast", register_kernels=lambda: [kernel]))
    spec = {
        "format": "int4",
        "options": {"narrow": True},
        "granularity": "group",
        "size": 16,
        "axis": 0,
        "rotate": {"block": 16, "back": True},
        "affine": {"axes": [-1, -2], "method": "mid"},
        "backend": "mine",
        "then": "fp8",
    }
    entry = toolkit.plan(model(), recipe(weight=spec)).entries[0]
    assert entry.spec.granularity == PerGroup(16, axis=0)
    assert entry.spec.format.params["narrow"] is True
    assert entry.spec.rotation == Rotation(block=16, back=True)
    assert entry.spec.affine == Affine(axes=(-1, -2), method="mid")
    assert entry.spec.backend == "mine"
    assert entry.spec.then is not None
    assert entry.spec.then.format.name == "fp8"
    assert "int4(narrow=True)" in str(entry.spec)


def test_several_axes_of_channels() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 8, 3))
    rule = {"match": {"class": "Conv2d"}, "weight": {"format": "int8", "granularity": "channel"}}
    rule["weight"] = {**rule["weight"], "axis": [0, 1]}  # type: ignore[dict-item]
    plan = bt.plan(conv, {"rules": [rule]})
    assert plan.entries[0].spec.granularity == PerChannel((0, 1))


def test_effective_bits_count_zero_points_and_global_scales() -> None:
    def bits(weight: Any) -> float:
        return bt.plan(nn.Sequential(nn.Linear(128, 64)), recipe(weight=weight)).effective_bits

    assert bits({"format": "int4", "size": 32}) == 4 + 32 / 32
    assert bits({"format": "int4-asym", "size": 32}) == 4 + (32 + 4) / 32
    assert bits({"format": "int4", "size": 32, "options": {"asymmetric": True}}) == 4 + 36 / 32
    assert bits("nvfp4") == 4 + 8 / 16 + 32 / (128 * 64)
    assert bits("mxfp6") == 6 + 8 / 32


def test_a_rotated_layer_gains_at_an_outlier() -> None:
    data = batches()
    for batch in data:
        batch[:, 5] *= 60
    errors = []
    for rotate in (False, True):
        layer = nn.Sequential(model()[0])
        expected = layer(data[0]).detach()
        spec = {"format": "int4", "granularity": "token", "rotate": rotate}
        weight = {"format": "int8", "granularity": "channel", "rotate": rotate}
        bt.quantize(layer, recipe(weight=weight, input=spec), data=data)
        errors.append(float((layer(data[0]) - expected).norm() / expected.norm()))
    assert errors[1] < 0.7 * errors[0]


WRONG = {
    "coarse block format": ({"weight": {"format": "mxfp6", "granularity": "channel"}}, "per group"),
    "coarse two levels": ({"weight": {"format": "nvfp4", "granularity": "tensor"}}, "block"),
    "size on channel": (
        {"weight": {"format": "int8", "granularity": "channel", "size": 16}},
        "size belongs",
    ),
    "unknown option": ({"weight": {"format": "int8", "options": {"narow": True}}}, "narow"),
    "options together": (
        {"weight": {"format": "int8", "options": {"narrow": True, "unsigned": True}}},
        "narrow",
    ),
    "bits": ({"weight": {"format": "int8", "options": {"bits": 3}}}, "bits is what makes"),
    "dynamic weight": ({"weight": {"format": "int8", "dynamic": True}}, "weights are static"),
    "token weight": ({"weight": {"format": "int8", "granularity": "token"}}, "no tokens"),
    "static groups": (
        {"input": {"format": "int8", "size": 16, "dynamic": False}},
        "fix the shape",
    ),
    "amax per channel": (
        {"weight": {"format": "int8", "granularity": "channel", "amax": 3}},
        "one range",
    ),
    "negative amax": ({"weight": {"format": "int8", "amax": -1}}, "greater than 0"),
    "nan amax": ({"weight": {"format": "int8", "amax": float("nan")}}, "amax"),
    "amax and dynamic": ({"input": {"format": "fp8", "amax": 448, "dynamic": True}}, "static"),
    "rotation": ({"weight": {"format": "int8", "rotate": "hademard"}}, "hadamard"),
    "affine": ({"weight": {"format": "int8", "affine": {"method": "median"}}}, "mean"),
    "rank": ({"weight": {"format": "int8", "granularity": "channel", "axis": 3}}, "2 dimensions"),
    "chain": ({"weight": ["int8", {"format": "fp9"}]}, "fp9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_says_what_would(name: str) -> None:
    slots, words = WRONG[name]
    with pytest.raises(RecipeError, match=words):
        bt.plan(model(), recipe(**slots))


def test_a_weight_that_holds_codes_already_is_named() -> None:
    broken = model()
    broken[0].weight = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RecipeError, match=r"0\.weight: cannot quantize a tensor of dtype"):
        bt.plan(broken, recipe(weight="int8"))


def test_ranges_that_are_given_or_dynamic_need_no_data() -> None:
    calls: list[int] = []
    for spec in (
        {"format": "fp8", "amax": 448},
        "mxfp8",
        {"format": "fp8", "granularity": "token"},
    ):
        quantized = model()
        bt.quantize(quantized, recipe(weight="int8", input=spec))
        bt.quantize(quantized, recipe(weight="int8", input=spec), data=lambda _: calls.append(1))
    assert calls == []
    biased = {"format": "fp8", "amax": 448, "affine": {"axes": [-1]}}
    assert bt.plan(model(), recipe(weight="int8", input=biased)).needs_data


@pytest.mark.parametrize("name", EVERY)
def test_torch_compile_takes_it_in_one_graph(name: str) -> None:
    quantized, data = model(), batches()
    bt.quantize(quantized, EVERY[name], data=data)
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(data[0]), quantized(data[0]))


@pytest.mark.parametrize("algorithm", ["max", "mse"])
def test_a_static_bias_is_that_of_all_batches(algorithm: str) -> None:
    data = batches()
    for number, batch in enumerate(data):
        batch.add_(10 * number)
    for method in ("mean", "mid"):
        quantized = nn.Sequential(model()[0])
        affine = {"axes": [-1], "method": method}
        spec = {"format": "int8", "granularity": "tensor", "affine": affine}
        bt.quantize(quantized, {**recipe(input=spec), "algorithm": algorithm}, data=data)
        every = torch.cat(data)
        mean, ends = every.mean(0), (every.amax(0) + every.amin(0)) / 2
        bias = mean if method == "mean" else ends
        (quantizer,) = (q for _, q in named_quantizers(quantized))
        assert quantizer.transforms is not None
        assert quantizer.transforms.bias is not None
        assert torch.allclose(quantizer.transforms.bias.flatten(), bias, atol=1e-4)
        assert quantizer.amax is not None
        if algorithm == "max":
            assert float(quantizer.amax) == pytest.approx(float((every - bias).abs().max()), 1e-5)


# --- what cannot work is said by the plan ---------------------------------------------------------


BAD = {
    "unknown backend": ({"format": "int8", "backend": "mien"}, "no backend 'mien'"),
    "unknown backend in a chain": (
        ["int4", {"format": "fp8", "backend": "mien"}],
        "no backend 'mien'",
    ),
    "no such blocks to rotate": (
        {"format": "int8", "rotate": {"block": 128, "back": True}},
        "64 columns do not divide into blocks of 128",
    ),
    "no power of two": (
        {"format": "int8", "rotate": {"block": 3}},
        "a Hadamard rotation needs a power of two, not 3",
    ),
    "a bias along axes that are not there": (
        {"format": "int8", "affine": {"axes": [2]}},
        "a tensor with 2 dimensions has no axes",
    ),
    "channels along no axis": (
        {"format": "int8", "granularity": "channel", "axis": []},
        "axis is an empty list",
    ),
    "a text for yes or no": (
        {"format": "int8", "options": {"narrow": "no"}},
        "narrow is 'no'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_weight_can_be_is_an_error_of_the_plan(case: str) -> None:
    said, problem = BAD[case]
    with pytest.raises(RecipeError, match=problem):
        bt.plan(model(), recipe(weight=said))


@pytest.mark.parametrize(
    "said",
    [
        {"format": "int8", "granularity": "channel", "axis": 5},
        {"format": "int8", "affine": {"axes": [5]}},
        {"format": "int8", "rotate": {"block": 128, "back": True}},
    ],
)
def test_what_an_input_turns_out_not_to_be_is_an_error_that_names_it(said: Any) -> None:
    with pytest.raises(BitternError, match=r"^0\.input: "):
        bt.quantize(model(), recipe(input=said), batches())


def test_a_table_may_be_a_list(tmp_path: Path) -> None:
    quantized = model()
    options = {"table": [-1.0, -0.25, 0.0, 0.5]}
    bt.quantize(quantized, recipe(weight={"format": "nf4", "options": options}))
    bt.save(quantized, tmp_path / "saved")
    fresh = model()
    bt.restore(fresh, tmp_path / "saved")
    assert torch.equal(fresh(batches()[0]), quantized(batches()[0]))


ROTATED = {"format": "int8", "rotate": "hadamard"}


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ({"weight": ROTATED}, "not rotated alike"),
        ({"weight": "int8", "input": ROTATED}, "not rotated alike"),
        ({"weight": ROTATED, "input": {"format": "int8", "rotate": {"block": 2}}}, "not rotated"),
        ({"weight": ROTATED, "input": ROTATED}, None),
        ({"weight": {"format": "int8", "rotate": {"back": True}}, "input": "int8"}, None),
    ],
)
def test_rotations_that_do_not_cancel_are_a_warning(
    slots: dict[str, Any], expected: str | None
) -> None:
    warnings = bt.plan(model(), recipe(**slots)).warnings
    if expected is None:
        assert not warnings
    else:
        assert len(warnings) == 2  # one for each layer
        assert all(expected in text for text in warnings)


def test_a_rotation_of_an_odd_number_of_columns_is_a_warning() -> None:
    odd = nn.Sequential(nn.Linear(63, 4), nn.Linear(64, 4))
    (warning,) = bt.plan(odd, recipe(weight=ROTATED, input=ROTATED)).warnings
    assert "0.weight has 63 columns" in warning


def test_a_rotation_along_other_axes_than_the_input_features_is_a_warning() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 4, 2))
    rule = {"match": {"class": "Conv2d"}, "weight": ROTATED, "input": ROTATED}
    (warning,) = bt.plan(conv, {"rules": [rule]}).warnings
    assert "0.weight is rotated along its last axis, which is not that" in warning
