"""Mse calibration against searches that try every range on the data itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bittern.calibration.estimators import mse_amax
from bittern.calibration.histogram import histogram_of
from bittern.calibration.search import best_range, multipliers
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers
from bittern.numerics import Range, amax, fake_quantize, measure, scales_for
from bittern.records import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, QuantizerSpec
from bittern.toolkit import Toolkit

MakeData = Callable[..., Tensor]
MakeSpec = Callable[..., QuantizerSpec]

E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)]
)


def error_of(x: np.ndarray, largest: float, name: str) -> float:
    """Return the mean squared error of rounding to a format that reaches ``largest``."""
    if largest == 0:
        return float((x**2).mean())
    if name == "fp8":
        scaled = np.abs(x) / (largest / 448)
        middles = (E4M3[1:] + E4M3[:-1]) / 2
        values = np.sign(x) * E4M3[np.searchsorted(middles, scaled)] * (largest / 448)
    else:
        top = 2 ** (int(name[3:]) - 1) - 1
        values = np.clip(np.rint(x / (largest / top)), -top - 1, top) * (largest / top)
    return float(((values - x) ** 2).mean())


def least_error(x: np.ndarray, name: str) -> float:
    """Return the smallest error of 100 ranges up to the maximum."""
    largest = float(np.abs(x).max())
    return min(error_of(x, largest * step / 500, name) for step in range(5, 501, 5))


def ranges(model: nn.Module) -> dict[str, Tensor]:
    return {name: q.amax for name, q in named_quantizers(model) if q.amax is not None}


# --- ranges of histograms -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1)], ids=str)
def test_the_error_is_within_five_percent_of_the_least(
    name: str, granularity: Granularity, data: str, make_data: MakeData, make_spec: MakeSpec
) -> None:
    x = make_data(data, 2000, 2) * torch.tensor([1.0, 5.0])
    known = histogram_of(x, granularity, amax=amax(x, granularity))
    found = mse_amax(known, make_spec(name, granularity))
    assert found.shape == known.amax.shape
    assert bool((found <= known.amax).all())
    columns = [x] if granularity == PerTensor() else list(x.unbind(1))
    for value, column in zip(found.flatten().tolist(), columns, strict=True):
        own = column.double().numpy()
        assert error_of(own, value, name) <= 1.05 * least_error(own, name)


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
@pytest.mark.parametrize("bins", [128, 2048])
@pytest.mark.parametrize("data", ["normal", "laplace"])
def test_few_values_and_coarse_bins_come_close(
    name: str, bins: int, data: str, make_data: MakeData, make_spec: MakeSpec
) -> None:
    x = make_data(data, 10000)
    known = histogram_of(x, PerTensor(), amax=amax(x, PerTensor()), bins=bins)
    found = float(mse_amax(known, make_spec(name)))
    own = x.double().numpy()
    assert error_of(own, found, name) <= 1.01 * least_error(own, name)


def test_the_center_stands_for_its_bin(make_spec: MakeSpec) -> None:
    x = torch.tensor([0.2, 1.9, 2.3, 3.7]).repeat(100)  # bins 1 to 4 of 8, as wide as 1
    x[0] = 7.0
    known = histogram_of(x, PerTensor(), amax=amax(x, PerTensor()), bins=8)
    assert mse_amax(known, make_spec("int4")) == 3.5  # steps of 0.5: no center but one is rounded


def test_zeros_have_the_range_zero(make_spec: MakeSpec) -> None:
    x = torch.zeros(10, 2)
    x[:, 1] = torch.randn(10)
    known = histogram_of(x, PerChannel(-1), amax=amax(x, PerChannel(-1)))
    found = mse_amax(known, make_spec("int8"))
    assert found[0, 0] == 0 < found[0, 1]


@pytest.mark.parametrize("name", ["int4", "fp8"])
@pytest.mark.parametrize("power", [-110, -60, 60, 120])
def test_tiny_and_huge_numbers_are_searched_like_others(
    power: int, name: str, make_data: MakeData, make_spec: MakeSpec
) -> None:
    spec = make_spec(name)
    x = make_data("laplace", 3000)
    scaled = torch.ldexp(x, torch.tensor(power))
    expected, found = (
        mse_amax(histogram_of(t, PerTensor(), amax=amax(t, PerTensor())), spec) for t in (x, scaled)
    )
    if power > -100:  # below, bins grow no finer
        assert torch.equal(torch.ldexp(expected, torch.tensor(power)), found)
    assert 0 < found <= scaled.abs().max()


# --- ranges of weights ----------------------------------------------------------------------------

LAYOUTS: dict[Granularity, Callable[[Tensor], list[list[Tensor]]]] = {
    PerTensor(): lambda w: [[w]],
    PerChannel(0): lambda w: [[row] for row in w],
    PerGroup(16): lambda w: [list(row.split(16)) for row in w],
    PerGroup(16, 0): lambda w: [list(tile.T) for tile in w.split(16)],
    PerBlock(4, 8): lambda w: [list(strip.split(8, 1)) for strip in w.split(4)],
}


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("granularity", list(LAYOUTS), ids=str)
@pytest.mark.parametrize("data", ["laplace", "outlier", "equal", "zero"])
def test_every_scale_gets_the_best_of_the_candidates(
    name: str, granularity: Granularity, data: str, make_data: MakeData, make_spec: MakeSpec
) -> None:
    x = make_data(data, 20, 40)
    x[:, 32:] *= 7
    spec = make_spec(name, granularity)
    candidates = [1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3]
    found = best_range(x, measure(x, spec), spec, candidates=candidates).amax

    pieces = LAYOUTS[granularity](x)
    assert found.shape == amax(x, granularity).shape
    flat = [piece for row in pieces for piece in row]
    for piece, value in zip(flat, found.flatten().tolist(), strict=True):
        own = piece.double().numpy()
        largest = float(np.abs(own).max())
        least = min(error_of(own, largest * candidate, name) for candidate in candidates)
        assert error_of(own, value, name) <= least * (1 + 1e-5) + 1e-12
        assert any(value == pytest.approx(largest * c, rel=1e-6) for c in candidates)


def test_equally_good_ranges_leave_the_first(make_spec: MakeSpec) -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 2.0]])  # exact in any range of a power of two
    spec = make_spec("fp8", PerChannel(0))
    found = best_range(x, measure(x, spec), spec, candidates=[1.0, 0.5, 2.0])
    assert found.amax.flatten().tolist() == [0.0, 4.0]


def test_both_ends_of_an_asymmetric_range_are_searched(
    toolkit: Toolkit, make_data: MakeData
) -> None:
    number_format = toolkit.registry.formats.get("int4-asym")
    spec = QuantizerSpec(number_format, PerChannel(0))
    x = make_data("laplace", 4, 500).abs() - 0.5
    whole = measure(x, spec)
    found = best_range(x, whole, spec, candidates=multipliers(spec, octaves=2))
    assert whole.amin is not None
    assert found.amin is not None
    torch.testing.assert_close(found.amin / whole.amin, found.amax / whole.amax)

    def total(values: Range) -> Tensor:
        return (fake_quantize(x, spec, scales_for(values, spec)) - x).square().sum(1)

    assert bool((total(found) < 0.9 * total(whole)).all())


# --- the algorithm --------------------------------------------------------------------------------


def recipe(options: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {"extends": "int8", **parts, "algorithm": {"mse": options}}


@pytest.fixture
def calibrated(
    make_mlp: Callable[..., nn.Module], toolkit: Toolkit
) -> Callable[[Any], dict[str, Tensor]]:
    """Calibrates the same model on the same data, with outliers in both; returns its ranges."""

    def calibrate(algorithm: Any) -> dict[str, Tensor]:
        model = make_mlp(width=64)
        with torch.no_grad():
            model.get_submodule("up").weight[:, 0] *= 30
        x = torch.randn(300, 64, generator=torch.Generator().manual_seed(5))
        x[0, 1] = 30
        rule = {"match": {"class": "Linear"}, "weight": "int4", "input": "int4"}
        toolkit.quantize(model, {"rules": [rule], "algorithm": algorithm}, [x[:100], x[100:]])
        return ranges(model)

    return calibrate


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("activations", [True, False])
def test_what_is_not_searched_stays_at_the_maximum(
    weights: bool, activations: bool, calibrated: Callable[[Any], dict[str, Tensor]]
) -> None:
    found = calibrated({"mse": {"weights": weights, "activations": activations}})
    largest = calibrated("max")
    assert bool((found["up.weight"] < largest["up.weight"]).any()) == weights
    assert bool(found["up.input"] < largest["up.input"]) == activations
    if not weights:
        assert torch.equal(found["up.weight"], largest["up.weight"])
    if not activations:
        assert torch.equal(found["up.input"], largest["up.input"])


COSTS = """
def absolute(rounded, x):
    return (rounded - x).abs()

def total(rounded, x):
    return (rounded - x).abs().sum()

number = 3
"""


@pytest.fixture
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with error functions."""
    (tmp_path / "costs_of_rounding.py").write_text(COSTS)
    monkeypatch.syspath_prepend(tmp_path)
    return "costs_of_rounding"


def test_an_error_function_of_the_recipe_is_used(
    costs: str, calibrated: Callable[[Any], dict[str, Tensor]]
) -> None:
    squares = calibrated("mse")
    absolute = calibrated({"mse": {"error": f"{costs}:absolute"}})
    # an outlier costs less when it is not squared, so ranges are smaller
    assert absolute["up.input"] < squares["up.input"]
    assert absolute["up.weight"].mean() < squares["up.weight"].mean()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "does not resolve"),
        ("number", "must be a function, not int"),
        ("total", r"returned shape \(\)"),
    ],
)
def test_an_error_function_that_is_none_is_named(
    name: str, problem: str, costs: str, calibrated: Callable[[Any], dict[str, Tensor]]
) -> None:
    with pytest.raises(CalibrationError, match=problem):
        calibrated({"mse": {"error": f"{costs}:{name}"}})


def every_format() -> list[str]:
    from bittern.builtin.formats import FORMATS

    return [number_format.name for number_format in FORMATS if number_format.name[0] != "u"]


@pytest.mark.parametrize("name", every_format())
def test_no_format_rounds_weights_worse_than_with_the_maximum(name: str, toolkit: Toolkit) -> None:
    errors = {}
    for algorithm in ("max", "mse"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 16)).requires_grad_(False)
        nn.init.normal_(model[0].weight)
        rule = {"match": "0", "weight": name}
        toolkit.quantize(model, {"rules": [rule], "algorithm": algorithm})
        weight = model[0].weight
        quantized = dict(named_quantizers(model))["0.weight"](weight)
        errors[algorithm] = float((quantized - weight).square().sum())
    assert errors["mse"] <= errors["max"] * 1.000001
    if name in ("int4", "int3", "int2", "int4-asym", "nvfp4"):
        assert errors["mse"] < 0.97 * errors["max"]


class Branches(nn.Module):
    """Reads one tensor with two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_weights_that_read_one_tensor_keep_one_global_scale(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = Branches()
    nn.init.normal_(model.a.weight, std=5)
    recipe = {"rules": [{"match": "*", "weight": "nvfp4"}], "algorithm": "mse"}
    toolkit.quantize(model, recipe, [torch.randn(4, 32)])
    quantizers = dict(named_quantizers(model))
    largest = model.a.weight.detach().abs().max()
    for name in ("a.weight", "b.weight"):
        assert torch.equal(quantizers[name].global_amax, largest)


def test_weights_of_zeros_stay_zeros(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight[1])
    toolkit.quantize(model, {"rules": [{"match": "0", "weight": "int8"}], "algorithm": "mse"})
    found = ranges(model)["0.weight"]
    assert found[1] == 0 < found[0]
    x = torch.ones(1, 8)
    assert model(x)[0, 1] == model[0].bias[1]


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-four-over-six", "mxfp4"])
def test_blocks_that_choose_their_scale_are_searched_too(name: str, toolkit: Toolkit) -> None:
    def error(algorithm: Any) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64)).eval()
        rule = {"match": {"class": "Linear"}, "weight": name}
        toolkit.quantize(model, {"extends": "base", "rules": [rule], "algorithm": algorithm})
        weight = model[0].weight.detach()
        return float((model[0].weight_quantizer(weight) - weight).square().sum())

    assert error("mse") <= error("max")
    if name == "nvfp4":
        assert error("mse") < 0.9 * error("max")


def test_headroom_is_for_global_scales(toolkit: Toolkit) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    rule = {"match": {"class": "Linear"}, "weight": "nvfp4", "input": "nvfp4"}
    found = []
    for options in ({}, {"headroom": 1.75}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32)).eval()
        algorithm = {"max": options}
        toolkit.quantize(model, {"extends": "base", "rules": [rule], "algorithm": algorithm}, [x])
        found.append((model[0].weight_quantizer, model[0].input_quantizer))
    for plain, wide in zip(*found, strict=True):
        assert torch.equal(wide.global_amax, plain.global_amax * 1.75)
    assert torch.equal(found[0][0].amax, found[1][0].amax)
    with pytest.raises(CalibrationError, match="headroom is 0"):
        toolkit.quantize(model, {"extends": "nvfp4", "algorithm": {"max": {"headroom": 0.5}}}, [x])
