"""nn.Linear and nn.Bilinear compute with quantized operands."""

from __future__ import annotations

import torch
from torch import nn

from bittern.toolkit import Toolkit

from .reference import TENSOR, WEIGHT, int8, with_weights


def test_a_linear_multiplies_quantized_operands(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(12, 7), torch.randn(2, 5, 12)
    plain = with_weights(model, weight=int8(model.weight, 0))
    recipe = {"rules": [{"match": "*", "weight": WEIGHT, "input": TENSOR, "output": TENSOR}]}
    with torch.no_grad():
        unquantized = model(x)
        toolkit.quantize(model, recipe, [x])

        assert torch.equal(model(x), int8(plain(int8(x)), amax=unquantized.abs().amax()))


def test_a_bilinear_multiplies_quantized_operands(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model, one, two = nn.Bilinear(6, 5, 4), torch.randn(3, 6), 7 * torch.randn(3, 5)
    plain = with_weights(model, weight=int8(model.weight, 0))
    recipe = {"rules": [{"match": "*", "weight": WEIGHT, "input": TENSOR}]}
    with torch.no_grad():
        result = toolkit.quantize(model, recipe, lambda m: m(one, two))

        assert [e.slot for e in result.plan.entries] == ["weight", "input1", "input2"]
        assert torch.equal(model(one, two), plain(int8(one), int8(two)))


def test_one_input_of_a_bilinear_can_be_left_alone(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model, one, two = nn.Bilinear(6, 5, 4, bias=False), torch.randn(3, 6), torch.randn(3, 5)
    plain = with_weights(model)
    rule = {"match": "*", "input": TENSOR, "slots": {"input2": "none"}}
    with torch.no_grad():
        toolkit.quantize(model, {"rules": [rule]}, lambda m: m(one, two))

        assert torch.equal(model(one, two), plain(int8(one), two))
