"""The low-rank branch of Conv1D, whose weight has its input features first."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import bittern as bt
from bittern.nn import quantizers_off
from bittern.numerics import fake_quantize

RECIPE = {
    "rules": [{"match": {"class": "Conv1D"}, "weight": "nvfp4", "input": "nvfp4"}],
    "algorithm": [{"svdquant": {"rank": 4}}],
}


@torch.no_grad()
def test_a_conv1d_adds_its_branch_to_what_its_rounded_rest_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(48, 32), nn.ReLU(), Conv1D(16, 48)).eval()
    x = torch.randn(2, 10, 32)
    expected = model(x)
    bt.quantize(model, RECIPE, data=[x])
    layer = model[0]
    quantizer = layer.quantizer("weight")
    branch = quantizer.transforms.low_rank
    assert branch.left.shape == (32, 4)
    assert branch.right.shape == (4, 48)
    rest = layer.weight - branch.left @ branch.right
    rest = fake_quantize(rest, quantizer.spec, quantizer.scales)
    reference = layer.input_quantizer(x) @ rest + layer.bias + x @ branch.left @ branch.right
    torch.testing.assert_close(layer(x), reference)
    with quantizers_off(model):
        assert torch.equal(model(x), expected)
