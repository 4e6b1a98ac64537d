"""Percentile calibration: the nearest-rank percentile, found without sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.calibration.estimators import percentile_amax
from bittern.calibration.histogram import Histogram, histogram_of
from bittern.errors import BitternError, CalibrationError
from bittern.nn import named_quantizers
from bittern.numerics import amax
from bittern.records import Granularity, PerChannel, PerTensor
from bittern.toolkit import Toolkit

MakeData = Callable[..., Tensor]


def histogram(x: Tensor, granularity: Granularity = PerTensor()) -> Histogram:  # noqa: B008
    return histogram_of(x, granularity, amax=amax(x, granularity))


def nearest_rank(values: Tensor, p: float) -> float:
    ordered = sorted(values.abs().flatten().tolist())
    return ordered[max(math.ceil(round(p * len(ordered) / 100, 9)), 1) - 1]


def ranges(model: nn.Module) -> dict[str, Tensor]:
    return {name: q.amax for name, q in named_quantizers(model) if q.amax is not None}


# --- the estimate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 1, 50, 90, 99, 99.9, 99.99, 100])
def test_it_is_at_most_one_bin_above_the_sorted_data(
    p: float, data: str, make_data: MakeData
) -> None:
    x = make_data(data, 2000, 3)
    for granularity, columns in ((PerTensor(), [x]), (PerChannel(-1), list(x.unbind(1)))):
        known = histogram(x, granularity)
        found = percentile_amax(known, p)
        assert found.shape == known.amax.shape
        widths = known.width.flatten().tolist()
        for value, width, column in zip(found.flatten().tolist(), widths, columns, strict=True):
            expected = nearest_rank(column, p)
            assert expected <= value <= expected + width * 1.000001


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1)], ids=str)
def test_a_hundred_is_the_maximum_bit_for_bit(
    granularity: Granularity, data: str, make_data: MakeData
) -> None:
    x = make_data(data, 500, 4)
    assert torch.equal(percentile_amax(histogram(x, granularity), 100), amax(x, granularity))


def test_ninety_of_the_first_hundred_numbers_is_89() -> None:
    assert percentile_amax(histogram(torch.arange(100.0)), 90) == 89


def test_a_whole_rank_is_not_rounded_up() -> None:
    x = torch.arange(1.0, 1001.0)  # 99.9 * 1000 / 100 is a little more than 999 in floats
    assert percentile_amax(histogram(x), 99.9) == 999


def test_zeros_can_be_left_out(make_data: MakeData) -> None:
    x = make_data("normal", 500)
    padded = histogram(torch.cat([x, torch.zeros(5000)]))

    assert torch.equal(
        percentile_amax(padded, 80, skip_zeros=True), percentile_amax(histogram(x), 80)
    )
    assert percentile_amax(padded, 80) == 0


def test_zeros_left_out_of_zeros_leave_the_range_zero() -> None:
    known = histogram(torch.zeros(10, 3), PerChannel(-1))
    assert torch.equal(percentile_amax(known, 50, skip_zeros=True), torch.zeros(1, 3))
    assert int(known.counts.sum()) == 30  # the histogram is not changed


@pytest.mark.parametrize("p", [0, -1, 100.01, float("nan"), "99", True, None])
def test_what_is_no_percentile_is_refused(p: Any) -> None:
    with pytest.raises(CalibrationError, match=f"p is {p!r}"):
        percentile_amax(histogram(torch.ones(3)), p)


# --- the algorithm --------------------------------------------------------------------------------


def recipe(**options: Any) -> dict[str, Any]:
    return {"extends": "int8", "algorithm": {"percentile": options}}


def test_activations_get_the_percentile_and_weights_the_maximum(
    make_mlp: Callable[..., nn.Module], toolkit: Toolkit
) -> None:
    model = make_mlp()
    batches = [torch.randn(50, 8) * scale for scale in (1, 3, 2)]
    toolkit.quantize(model, recipe(p=90), batches)

    expected = nearest_rank(torch.cat(batches), 90)
    width = float(histogram(torch.cat(batches)).width)
    assert expected <= float(ranges(model)["up.input"]) <= expected + width
    weight = model.get_submodule("up").weight.detach()
    assert torch.equal(ranges(model)["up.weight"], weight.abs().amax(1, keepdim=True))


def test_more_bins_come_closer(make_mlp: Callable[..., nn.Module], toolkit: Toolkit) -> None:
    batches = [torch.randn(100, 8)]
    errors = {}
    for bins in (16, 65536):
        model = make_mlp()
        toolkit.quantize(model, recipe(p=90, bins=bins), batches)
        errors[bins] = float(ranges(model)["up.input"]) - nearest_rank(batches[0], 90)
    assert 0 <= errors[65536] < 2e-4 < errors[16]


@pytest.mark.parametrize(
    ("options", "problem"), [({"p": 0}, "p is 0"), ({"bins": 100}, "cannot have 100 bins")]
)
def test_wrong_options_are_refused_before_the_data_pass(
    options: dict[str, Any],
    problem: str,
    make_mlp: Callable[..., nn.Module],
    toolkit: Toolkit,
) -> None:
    def never(model: nn.Module) -> None:
        raise AssertionError("the data pass began")

    with pytest.raises(CalibrationError, match=problem):
        toolkit.quantize(make_mlp(), recipe(**options), never)


class Branches(nn.Module):
    """Reads one tensor with two linears; the second sits out small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        return out + self.b(x) if len(x) > 1 else out


def test_inputs_that_are_one_tensor_get_one_range(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    batches = [torch.randn(300, 4), 50 * torch.randn(1, 4)]
    toolkit.quantize(model, recipe(p=99.9), batches)
    found = ranges(model)
    assert found["a.input"] == found["b.input"] > batches[0].abs().max()


def test_what_has_no_histogram_is_calibrated_by_max(
    make_mlp: Callable[..., nn.Module], toolkit: Toolkit
) -> None:
    model = make_mlp()
    batches = [torch.randn(50, 8) for _ in range(3)]
    rules = [
        {"match": "up", "input": {"format": "int8-asym", "granularity": "tensor"}},
        {"match": "down", "input": "int8"},
    ]
    result = toolkit.quantize(
        model, {"rules": rules, "algorithm": {"percentile": {"p": 50}}}, batches
    )

    quantizers = dict(named_quantizers(model))
    data = torch.cat(batches)
    assert quantizers["up.input"].amax == data.max()
    assert quantizers["up.input"].amin == data.min()
    with torch.no_grad():
        hidden = torch.cat([torch.relu(model.norm(model.up(x))) for x in batches])
    assert ranges(model)["down.input"] < hidden.max() / 2
    assert not result.report.calibration.uncalibrated


@pytest.mark.parametrize("algorithm", ["max", "percentile", "entropy", "mse"])
def test_negative_numbers_for_a_format_without_are_an_error_that_names_the_quantizer(
    algorithm: str, make_mlp: Callable[..., nn.Module], toolkit: Toolkit
) -> None:
    rules = [{"match": "up", "input": {"format": "uint8", "granularity": "tensor"}}]
    whole = {"rules": rules, "algorithm": algorithm}
    toolkit.quantize(make_mlp(), whole, [torch.rand(50, 8)])
    with pytest.raises(BitternError, match=r"up\.input: uint8 holds no negative numbers"):
        toolkit.quantize(make_mlp(), whole, [torch.rand(50, 8), torch.randn(50, 8)])
