"""Bias correction: the mean of every layer's outputs is that of its unquantized self."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import CalibrationError
from bittern.toolkit import Toolkit

LINEAR = {"match": {"class": ["Linear", "Conv2d"]}, "weight": {"format": "int4"}}
STATIC = {**LINEAR, "input": {"format": "int8", "granularity": "tensor"}}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)]
    return nn.Sequential(*layers).eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(8, 3, 6, 6, generator=generator) for _ in range(3)]


def recipe(rule: dict[str, Any], *steps: Any) -> dict[str, Any]:
    return {"extends": "base", "rules": [rule], "algorithm": list(steps)}


@torch.no_grad()
def bruteforce(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    """Return the biases of both layers, from their quantizers alone, in float64."""
    conv, linear = model[0], model[3]

    def weight(layer: nn.Module, *, rounded: bool) -> Tensor:
        return (layer.weight_quantizer(layer.weight) if rounded else layer.weight).double()

    def sees(layer: nn.Module, x: Tensor, *, rounded: bool) -> Tensor:
        return (
            layer.input_quantizer(x) if rounded and hasattr(layer, "input_quantizer") else x
        ).double()

    def first(x: Tensor, *, rounded: bool) -> Tensor:
        return nn.functional.conv2d(sees(conv, x, rounded=rounded), weight(conv, rounded=rounded))

    def second(h: Tensor, *, rounded: bool) -> Tensor:
        return sees(linear, h, rounded=rounded) @ weight(linear, rounded=rounded).T

    x = torch.cat(data)
    lost = first(x, rounded=False) - first(x, rounded=True)
    h = model[2](model[1](conv(x)))  # of the quantized model
    shift = second(h, rounded=False) - second(h, rounded=True)
    return [conv.bias + lost.mean((0, 2, 3)), linear.bias + shift.mean(0)]


@pytest.mark.parametrize("rule", [LINEAR, STATIC], ids=["weights", "inputs too"])
def test_biases_are_those_of_brute_force(rule: dict[str, Any], toolkit: Toolkit) -> None:
    plain, corrected = network(), network()
    toolkit.quantize(plain, recipe(rule, "max"), images())
    toolkit.quantize(corrected, recipe(rule, "max", "bias-correction"), images())
    for layer, expected in zip(
        (corrected[0], corrected[3]), bruteforce(plain, images()), strict=True
    ):
        torch.testing.assert_close(layer.bias.double(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(plain[0].bias, corrected[0].bias)
    assert torch.equal(plain[0].weight, corrected[0].weight)


def test_the_mean_of_the_outputs_comes_back(toolkit: Toolkit) -> None:
    expected = network()(torch.cat(images())).mean(0).detach()

    def shift(*steps: str) -> float:
        model = network()
        toolkit.quantize(model, recipe(LINEAR, *steps), images())
        return float((model(torch.cat(images())).mean(0) - expected).detach().norm())

    assert shift("max", "bias-correction") < 0.3 * shift("max")


def test_layers_without_a_bias_are_left_alone(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).eval()
    before = copy.deepcopy(model.state_dict())
    toolkit.quantize(
        model, recipe({**LINEAR, "match": "*"}, "max", "bias-correction"), [torch.rand(9, 4)]
    )
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"1.bias"}


def test_a_later_failure_puts_biases_back(toolkit: Toolkit) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    steps = ("max", "bias-correction", {"percentile": {"p": 101}})
    with pytest.raises(CalibrationError, match="101"):
        toolkit.quantize(model, recipe(LINEAR, *steps), images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
