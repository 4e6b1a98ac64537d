"""GPTQ on whole models: fixed points of every format, outputs, fallbacks, undo."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.errors import BitternError, CalibrationError
from bittern.nn import named_quant_modules, quantizers_off
from bittern.numerics import fake_quantize

FORMATS: dict[str, Any] = {
    "int4": {"format": "int4", "granularity": "group", "size": 16},
    "int4 channel": {"format": "int4", "granularity": "channel"},
    "int4-asym": {"format": "int4-asym", "granularity": "group", "size": 16},
    "int4 partial": {"format": "int4", "granularity": "group", "size": 24},
    "fp8": "fp8",
    "fp8 block": {"format": "fp8", "granularity": "block", "rows": 16, "cols": 16},
    "nvfp4": "nvfp4",
    "four over six": "nvfp4-four-over-six",
    "mxfp4": "mxfp4",
    "mxint8": "mxint8",
    "nf4": "nf4",
}


def recipe(weight: Any, **options: Any) -> dict[str, Any]:
    rules = [{"match": "*", "weight": weight}]
    return {"rules": rules, "algorithm": {"gptq": options} if options else "gptq"}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=generator) / 8 + torch.diag(
        torch.rand(64, generator=generator) * 2
    )
    return [torch.randn(96, 64, generator=generator) @ mix for _ in range(count)]


def error(model: nn.Module, plain: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - plain(x)).square().sum()) for x in batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_hold_rounded_numbers(name: str, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    before = copy.deepcopy(model)
    bt.quantize(model, recipe(FORMATS[name]), [x.to(dtype) for x in data(2)])
    for path, module in named_quant_modules(model):
        quantizer = module.quantizer("weight")
        assert quantizer is not None
        weight = module.weight.detach()
        assert torch.equal(fake_quantize(weight, quantizer.spec, quantizer.scales), weight)
        assert not torch.equal(weight, before.get_parameter(f"{path}.weight"))


@pytest.mark.parametrize("name", ["int4", "int4-asym", "int4 channel", "nvfp4", "mxfp4", "fp8"])
def test_outputs_come_closer_than_by_rounding_to_nearest(name: str) -> None:
    plain, nearest, model = build(), build(), build()
    bt.quantize(nearest, {**recipe(FORMATS[name]), "algorithm": "mse"}, data())
    bt.quantize(model, recipe(FORMATS[name]), data())
    held_out = data(8)[4:]
    assert error(model, plain, held_out) < 0.8 * error(nearest, plain, held_out)


def test_scales_and_order_of_columns_can_be_chosen() -> None:
    plain = build()
    found = {}
    for order in (False, True):
        for scales in ("max", "mse"):
            model = build()
            bt.quantize(model, recipe(FORMATS["int4"], act_order=order, scales=scales), data())
            found[order, scales] = error(model, plain, data())
    assert len(set(found.values())) == 4
    assert found[False, "mse"] < found[False, "max"]
    assert found[True, "mse"] < found[False, "mse"]  # some inputs are much larger than others


def test_more_passes_come_closer() -> None:
    plain, once, again = build(), build(), build()
    bt.quantize(once, recipe(FORMATS["int4"]), data())
    bt.quantize(again, recipe(FORMATS["int4"], passes=4), data())
    assert error(again, plain, data()) < 0.97 * error(once, plain, data())


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_before_they_are_rounded_round_to_the_same(name: str) -> None:
    rounded, waiting, plain = build(), build(), build()
    bt.quantize(rounded, recipe(FORMATS[name], passes=1), data(2))
    bt.quantize(waiting, recipe(FORMATS[name], passes=1, rounded=False), data(2))
    x = data(3)[2]
    with torch.no_grad():
        torch.testing.assert_close(waiting(x), rounded(x), rtol=1e-5, atol=1e-5)
    for path, module in named_quant_modules(waiting):
        weight = module.get_parameter("weight")
        assert not torch.equal(weight, rounded.get_parameter(f"{path}.weight"))
        assert not torch.equal(weight, plain.get_parameter(f"{path}.weight"))


def test_learned_rounding_goes_on_from_there() -> None:
    found = {}
    for steps in ("gptq", "learn"), ("learn",):
        model, algorithm = build(), []
        if "gptq" in steps:
            algorithm.append({"gptq": {"rounded": False}})
        algorithm.append({"distill-rounding": {"steps": 1, "lr": 1e-9, "half": False}})
        bt.quantize(model, recipe(FORMATS["int4 channel"]) | {"algorithm": algorithm}, data(4))
        found[steps] = error(model, build(), data(4))
    alone = build()
    bt.quantize(alone, recipe(FORMATS["int4 channel"]), data(4))
    assert found["gptq", "learn"] == pytest.approx(error(alone, build(), data(4)), rel=1e-3)
    assert found["gptq", "learn"] < 0.8 * found["learn",]


def test_ranges_at_max_are_those_of_max_calibration() -> None:
    model, largest = build(), build()
    bt.quantize(model, recipe("int4", scales="max", act_order=True), data())
    bt.quantize(largest, {**recipe("int4"), "algorithm": "max"})
    for index in (0, 2):
        assert torch.equal(model[index].weight_quantizer.amax, largest[index].weight_quantizer.amax)


def test_weights_are_fitted_to_rounded_inputs() -> None:
    rules = [{"match": "*", "weight": "int4", "input": {"format": "int4", "granularity": "tensor"}}]
    model, plain = build(), build()
    bt.quantize(model, {"rules": rules, "algorithm": "gptq"}, data())
    other = build()
    bt.quantize(other, {"rules": rules, "algorithm": {"mse": {"activations": False}}}, data())
    assert torch.equal(model[0].input_quantizer.amax, other[0].input_quantizer.amax)
    assert error(model, plain, data()) < error(other, plain, data())
    assert model[0].input_quantizer.calibrated


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(groups: int) -> None:
    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=groups)).eval()

    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(8, 4, 12, 12, generator=generator)
    x = noise.cumsum(-1) / 3  # neighbors are alike, as in images
    weight = {"format": "int4", "granularity": "channel"}
    plain, nearest, model = conv(), conv(), conv()
    bt.quantize(nearest, {**recipe(weight), "algorithm": "mse"}, [x])
    bt.quantize(model, recipe(weight), [x])
    assert error(model, plain, [x]) < 0.7 * error(nearest, plain, [x])


def test_a_weight_that_no_product_reads_is_rounded_to_nearest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4)).eval()
    before = model[0].weight.detach().clone()
    with caplog.at_level(logging.WARNING, "bittern.calibration"):
        bt.quantize(model, recipe("int8"), [torch.arange(10)])
    assert "0.weight is rounded to nearest: the data did not reach it" in caplog.text
    assert torch.equal(model[0].weight, before)
    assert model[0].weight_quantizer.calibrated


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    batches = data()
    for x in batches:
        x[:, 3] = 0
        x[:, 40:] = 0
    model, plain = build(), build()
    bt.quantize(model, recipe(FORMATS["int4"]), batches)
    scales = model[0].weight_quantizer.scales
    nearest = fake_quantize(plain[0].weight.detach(), model[0].weight_quantizer.spec, scales)
    assert torch.equal(model[0].weight[:, 3], nearest[:, 3])
    assert torch.equal(model[0].weight[:, 40:], nearest[:, 40:])


def test_fewer_tokens_than_inputs_are_enough() -> None:
    batches = [data(1)[0][:8]]
    model, nearest, plain = build(), build(), build()
    bt.quantize(model, recipe(FORMATS["int4"]), batches)
    bt.quantize(nearest, {**recipe(FORMATS["int4"]), "algorithm": "mse"}, batches)
    assert error(model, plain, batches) < error(nearest, plain, batches)


def test_tied_weights_are_rounded_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(self.one(x).relu())
            return found

    torch.manual_seed(0)
    tied = Tied().eval()
    weight = {"format": "int4", "granularity": "group", "size": 8}
    bt.quantize(tied, recipe(weight), [torch.randn(64, 16)])
    assert tied.one.weight is tied.two.weight
    for module in (tied.one, tied.two):
        assert torch.equal(module.weight_quantizer(module.weight), module.weight)


def test_weights_are_fitted_to_what_the_rounded_ones_before_them_compute() -> None:
    def fitted(**options: Any) -> nn.Module:
        model = build()
        bt.quantize(model, recipe("int2", **options), data())
        return model

    once, again, alone = fitted(), fitted(true_sequential=True), build()
    assert torch.equal(once[0].weight, again[0].weight)
    assert not torch.equal(once[2].weight, again[2].weight)
    with torch.no_grad():
        inner = [again[1](again[0](x)) for x in data()]
        alone = nn.Sequential(alone[2])
        bt.quantize(alone, recipe("int2"), inner)
    assert torch.equal(again[2].weight, alone[0].weight)


def test_an_error_in_a_later_step_puts_the_weights_back() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    later = {**recipe("int4"), "algorithm": ["gptq", {"percentile": {"p": 400}}]}
    with pytest.raises(BitternError):
        bt.quantize(model, later, data())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": "best"}, "choose max or mse"),
        ({"damp": 0}, "damp"),
        ({"block": 0}, "block"),
        ({"passes": -1}, "passes"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        bt.quantize(build(), recipe("int4", **options), data())


def test_an_int4_weight_held_in_fp8_stays_a_fixed_point_of_int4() -> None:
    model = build()
    weight = {"format": "int4", "granularity": "group", "size": 16, "then": "fp8"}
    bt.quantize(model, recipe(weight), data())
    quantizer = model[0].weight_quantizer
    found = model[0].weight.detach()
    assert torch.equal(fake_quantize(found, quantizer.spec, quantizer.scales), found)
    assert quantizer.then.calibrated
    with quantizers_off(model), torch.no_grad():
        assert torch.isfinite(model(data()[0])).all()
