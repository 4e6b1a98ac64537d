"""Convolutions and transposed convolutions compute with quantized operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bittern.nn import QuantModule
from bittern.toolkit import Toolkit

from .reference import TENSOR, WEIGHT, int8, with_weights

BOTH = {"rules": [{"match": "*", "weight": WEIGHT, "input": TENSOR}]}
CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def images(dimensions: int, channels: int = 4, *, batch: bool = True) -> torch.Tensor:
    return torch.randn(*([2] if batch else []), channels, *[6, 5, 7][:dimensions])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_convolution_pads_as_torch_does(dimensions: int, mode: Any, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = CONVS[dimensions - 1](4, 6, 3, padding=1, stride=2, groups=2, padding_mode=mode)
    x = images(dimensions)
    plain = with_weights(model, weight=int8(model.weight, 0))
    with torch.no_grad():
        toolkit.quantize(model, BOTH, [x])

        assert torch.equal(model(x), plain(int8(x)))


def test_a_convolution_pads_to_the_same_size(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model, x = nn.Conv1d(4, 6, 4, padding="same", dilation=2), images(1)
    plain = with_weights(model, weight=int8(model.weight, 0))
    with torch.no_grad():
        toolkit.quantize(model, BOTH, [x])

        assert torch.equal(model(x), plain(int8(x)))


@pytest.mark.parametrize(("groups", "axis"), [(1, 1), (2, 1), (4, 0)])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_transposed_convolution_has_scales_per_output_channel_or_group(
    dimensions: int, groups: int, axis: int, toolkit: Toolkit
) -> None:
    torch.manual_seed(0)
    make = TRANSPOSED[dimensions - 1]
    model = make(4, 8, 3, stride=2, padding=1, output_padding=1, groups=groups, dilation=2)
    x = images(dimensions)
    plain = with_weights(model, weight=int8(model.weight, axis))
    with torch.no_grad():
        result = toolkit.quantize(model, BOTH, [x])

        assert torch.equal(model(x), plain(int8(x)))
    scales = {(1, 1): 8, (2, 1): 4, (4, 0): 4}[groups, axis]
    quantizer = model.quantizer("weight")
    assert quantizer.amax.numel() == scales
    assert result.plan.entries[0].slot_rule.channel_axis == axis


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_output_size_of_a_transposed_convolution_can_be_given(
    dimensions: int, batch: bool, toolkit: Toolkit
) -> None:
    torch.manual_seed(0)
    model = TRANSPOSED[dimensions - 1](4, 3, 3, stride=2, padding=1)
    x = images(dimensions, batch=batch)
    size = [2 * n for n in x.shape[-dimensions:]]
    plain = with_weights(model, weight=int8(model.weight, 1))
    with torch.no_grad():
        toolkit.quantize(model, BOTH, [x])
        found = model(x, output_size=size)

        assert list(found.shape[-dimensions:]) == size
        assert torch.equal(found, plain(int8(x), size))
    with pytest.raises(ValueError, match="requested an output size"):
        model(x, [99] * dimensions)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("make", [*CONVS, *TRANSPOSED])
def test_channels_of_activations_are_found_with_a_batch_and_without(
    make: Any, batch: bool, toolkit: Toolkit
) -> None:
    torch.manual_seed(0)
    model: Any = make(4, 3, 3)
    dimensions = model.weight.dim() - 2
    x = images(dimensions, batch=batch)
    channels = {"format": "int8", "granularity": "channel"}
    rule = {"match": "*", "input": channels, "output": channels}
    with torch.no_grad():
        toolkit.quantize(model, {"rules": [rule]}, [x])

    assert isinstance(model, QuantModule)
    assert model.slots()["input"].amax.numel() == 4
    assert model.slots()["output"].amax.numel() == 3
