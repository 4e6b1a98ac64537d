"""HQQ-like ranges: against brute force, and never worse than the extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bittern.calibration.hqq import _tried, fit_range
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers
from bittern.numerics import Range, fake_quantize, measure, scales_for
from bittern.records import PerChannel, PerGroup, QuantizerSpec
from bittern.toolkit import Toolkit

Data = Callable[..., Tensor]
ASYMMETRIC = ("int2-asym", "int3-asym", "int4-asym")


def spec_of(toolkit: Toolkit, name: str, size: int = 16) -> QuantizerSpec:
    return QuantizerSpec(toolkit.registry.formats.get(name), PerGroup(size))


def error(x: Tensor, spec: QuantizerSpec, *, p: float, fit: bool = True) -> Tensor:
    """Return the sum of the errors' powers in each group."""
    values = measure(x, spec)
    if fit:
        values = fit_range(x, values, spec, p=p)
    rounded = fake_quantize(x, spec, scales_for(values, spec))
    size = spec.granularity.size  # type: ignore[union-attr]
    return (rounded - x).double().abs().pow(p).reshape(*x.shape[:-1], -1, size).sum(-1)


def brute_force(group: Tensor, low: int, high: int) -> float:
    """Return the least squared error of a group, over all zero points and very many scales."""
    width = float(group.max() - group.min())
    least = float("inf")
    scales = torch.linspace(0.3, 1.3, 3000, dtype=torch.float64)[:, None] * width / (high - low)
    for zero in range(low, high + 1):
        codes = ((group / scales).round() + zero).clamp(low, high) - zero
        least = min(least, float((codes * scales - group).square().sum(1).min()))
    return least


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_it_comes_close_to_brute_force(name: str, toolkit: Toolkit, make_data: Data) -> None:
    x = make_data("normal", 40, 16)
    bits = int(name[3])
    best = sum(brute_force(g, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for g in x.double())
    found = float(error(x, spec_of(toolkit, name), p=2).sum())
    extremes = float(error(x, spec_of(toolkit, name), p=2, fit=False).sum())
    assert best * 0.999 <= found <= best * 1.05
    assert found < 0.9 * extremes


@pytest.mark.parametrize("name", [*ASYMMETRIC, "int4", "int8-asym"])
def test_a_fit_keeps_what_it_promises(name: str, toolkit: Toolkit, make_data: Data) -> None:
    """The bound is the least squared error of the codes, and rounding anew makes it no larger."""
    x, spec = make_data("laplace", 20, 16) + 0.1, spec_of(toolkit, name)
    start, count = measure(x, spec), torch.full((20, 1), 16.0)
    trial = _tried(x, start, spec, p=2, count=count)
    again = _tried(x, trial.fitted, spec, p=2, count=count)
    assert bool((again.cost <= trial.bound * (1 + 1e-4) + 1e-9).all())
    codes = (fake_quantize(x, spec, scales_for(start, spec)).double() / step(start, spec)).round()
    zeros = range(-20, 21) if start.amin is not None else (0,)
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for zero in zeros:  # all scales at once, by least squares
        moved = codes + zero
        scale = (x * moved).sum(1) / moved.square().sum(1)
        cost = (scale[:, None] * moved - x).square().sum(1)
        best = torch.minimum(best, torch.where(scale > 0, cost, torch.inf))
    bound = trial.bound.double().squeeze(1)
    assert bool((bound >= best * (1 - 1e-4)).all())
    assert float(bound.sum()) < 1.01 * float(best.sum())


def step(values: Range, spec: QuantizerSpec) -> Tensor:
    """Return the distance of neighboring codes."""
    bits = spec.format.bits
    if values.amin is None:
        return values.amax.double() / (2 ** (bits - 1) - 1)
    return (values.amax - values.amin).double() / (2**bits - 1)


class Rounds(TorchDispatchMode):
    """Counts how often a whole tensor is rounded."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "round" in func.__name__ and args[0].numel() == self.size:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["int4-asym", "int4"])
def test_a_weight_is_rounded_a_few_times(name: str, toolkit: Toolkit, make_data: Data) -> None:
    x, spec = make_data("normal", 8, 64), spec_of(toolkit, name)
    values = measure(x, spec)
    with Rounds(x.numel()) as once:
        fake_quantize(x, spec, scales_for(values, spec))
    with Rounds(x.numel()) as seen:
        fit_range(x, values, spec)
    assert 3 * once.count <= seen.count <= 13 * once.count


@pytest.mark.parametrize("p", [0.7, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("name", [*ASYMMETRIC, "int2", "int3", "int4", "fp8", "nf4", "mxfp4"])
def test_no_group_gets_worse(
    name: str, p: float, toolkit: Toolkit, make_data: Data, data: str
) -> None:
    x, spec = make_data(data, 6, 64), spec_of(toolkit, name)
    assert bool((error(x, spec, p=p) <= error(x, spec, p=p, fit=False) * (1 + 1e-5)).all())


def test_the_power_says_which_errors_count(toolkit: Toolkit, make_data: Data) -> None:
    x, spec = make_data("laplace", 20, 64), spec_of(toolkit, "int3-asym", 64)

    def cost(fitted: float, judged: float) -> float:
        values = fit_range(x, measure(x, spec), spec, p=fitted)
        rounded = fake_quantize(x, spec, scales_for(values, spec))
        return float((rounded - x).abs().pow(judged).sum())

    assert cost(1.0, 1.0) < cost(3.0, 1.0)
    assert cost(3.0, 3.0) < cost(1.0, 3.0)


@pytest.mark.parametrize("power", [-120, 100])
def test_the_size_of_the_numbers_makes_no_difference(
    power: int, toolkit: Toolkit, make_data: Data
) -> None:
    x, spec = make_data("normal", 5, 32), spec_of(toolkit, "int4-asym")
    first = fit_range(x, measure(x, spec), spec)
    other = x * 2.0**power
    second = fit_range(other, measure(other, spec), spec)
    torch.testing.assert_close(second.amax, first.amax * 2.0**power, rtol=1e-5, atol=0)


def test_groups_of_zeros_and_partial_groups_stay_finite(toolkit: Toolkit, make_data: Data) -> None:
    x = make_data("normal", 4, 40)
    x[1] = 0
    spec = spec_of(toolkit, "int4-asym")
    values = fit_range(x, measure(x, spec), spec)
    rounded = fake_quantize(x, spec, scales_for(values, spec))
    assert values.amax.shape == (4, 3)
    assert bool(rounded.isfinite().all())
    assert torch.equal(rounded[1], torch.zeros(40))


def test_channels_have_ranges_as_well(toolkit: Toolkit, make_data: Data) -> None:
    spec = QuantizerSpec(toolkit.registry.formats.get("int4-asym"), PerChannel(0))
    x = make_data("laplace", 8, 64)
    values = fit_range(x, measure(x, spec), spec)

    def cost(found: Tensor) -> Tensor:
        return (found - x).square().sum(1)

    fitted = cost(fake_quantize(x, spec, scales_for(values, spec)))
    assert bool((fitted < cost(fake_quantize(x, spec))).all())


@pytest.mark.parametrize("name", ["int4-asym", "nvfp4"])
def test_rows_of_a_large_weight_have_the_ranges_they_have_alone(
    name: str, toolkit: Toolkit, make_data: Data
) -> None:
    x, spec = make_data("normal", 1100, 256), spec_of(toolkit, name)  # more than a chunk
    start = measure(x, spec)
    whole = fit_range(x, start, spec, rounds=1)
    rows = slice(1000, 1050)
    amin = None if start.amin is None else start.amin[rows]
    alone = fit_range(
        x[rows], Range(start.amax[rows], amin=amin, global_amax=start.global_amax), spec, rounds=1
    )
    assert whole.amax.shape == start.amax.shape
    torch.testing.assert_close(whole.amax[rows], alone.amax, rtol=0, atol=0)
    assert whole.global_amax is None or torch.equal(whole.global_amax, start.global_amax)


# --- in a recipe ----------------------------------------------------------------------------------


def test_the_recipe_needs_no_data_and_runs_no_forward(
    toolkit: Toolkit, make_mlp: Callable[..., nn.Module]
) -> None:
    model = make_mlp()
    ran: list[object] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    toolkit.quantize(model, "int4-hqq")
    quantizers = dict(named_quantizers(model))
    assert quantizers
    assert not ran
    for name, quantizer in quantizers.items():
        weight = weights[f"{name.removesuffix('.weight')}.weight"]
        expected = fit_range(weight, measure(weight, quantizer.spec), quantizer.spec)
        assert quantizer.range is not None
        torch.testing.assert_close(quantizer.range.amax, expected.amax)


def test_static_activations_are_calibrated_by_max(
    toolkit: Toolkit, make_mlp: Callable[..., nn.Module]
) -> None:
    model, x = make_mlp(), torch.randn(4, make_mlp().up.in_features)
    toolkit.quantize(model, {"extends": "int8", "algorithm": "hqq"}, [x])
    found = dict(named_quantizers(model))["up.input"].amax
    assert found is not None
    assert float(found) == pytest.approx(float(x.abs().max()))


@pytest.mark.parametrize("options", [{"p": 0}, {"p": 9}, {"rounds": -1}, {"rounds": 1.5}])
def test_options_out_of_range_are_refused(
    options: dict[str, float], toolkit: Toolkit, make_mlp: Callable[..., nn.Module]
) -> None:
    with pytest.raises(CalibrationError, match=next(iter(options))):
        toolkit.quantize(make_mlp(), {"extends": "int4-hqq", "algorithm": [{"hqq": options}]})
