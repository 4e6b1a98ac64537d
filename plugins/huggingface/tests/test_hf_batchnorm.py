"""BatchNorm folding of convolutional models of transformers, from their configs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import bittern as bt
from bittern.nn import quantizers_off
from bittern.nn.batchnorm import FoldedBatchNorm


def resnet(layer_type: str) -> PreTrainedModel:
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 2, 1, 1],
        layer_type=layer_type,
        num_labels=5,
    )
    return ResNetForImageClassification(config)


def regnet() -> PreTrainedModel:
    config = RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], groups_width=4
    )
    return RegNetForImageClassification(config)


def mobilenet() -> PreTrainedModel:
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.1))


MODELS = {
    "resnet-basic": lambda: resnet("basic"),
    "resnet-bottleneck": lambda: resnet("bottleneck"),
    "regnet": regnet,
    "mobilenet": mobilenet,
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_batchnorm_is_folded_and_the_function_stays(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.1, 2)
    x = torch.randn(2, 3, 48, 48)
    expected = model.double()(x.double()).logits
    model.float()

    bt.quantize(model, "int8-cnn", data=[{"pixel_values": x}])

    with quantizers_off(model):
        found = model(x).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-6
    assert len(norms) > 10
    assert all(isinstance(norm, FoldedBatchNorm) for norm in norms)
