"""Norms, pools and activations: what goes in is quantized, and what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern
from bittern.builtin.modules import MODULE_RULES
from bittern.nn import quantizers_off
from bittern.toolkit import Toolkit

from .reference import TENSOR, int8

SIZES = [6, 4, 8]
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "Threshold": (0.1, 2.0),
    "GroupNorm": (2, 4),
    "LayerNorm": ([4, 6],),
    "RMSNorm": ([4, 6],),
    "LocalResponseNorm": (2,),
    "SyncBatchNorm": (4,),
    "LPPool": (2, 2),
    "BatchNorm": (4,),
    "InstanceNorm": (4,),
    "MaxPool": (2,),
    "AvgPool": (2,),
    "AdaptiveMaxPool": (2,),
    "AdaptiveAvgPool": (2,),
    "Softmax": (1,),
    "LogSoftmax": (1,),
    "Softmin": (1,),
}
IN_OUT = [rule.target.partition(":")[2] for rule in MODULE_RULES if rule.by_name]


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a layer of the class and an input for it."""
    stem, digit = (name[:-2], int(name[-2])) if name[-2:] in ("1d", "2d", "3d") else (name, 1)
    if name == "Softmax2d":
        stem, digit = name, 2
    torch.manual_seed(0)
    layer = getattr(nn, name)(*ARGUMENTS.get(name, ARGUMENTS.get(stem, ()))).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, 3 * torch.randn(2, 4, *SIZES[:digit])


def recipe(name: str, *slots: str) -> dict[str, Any]:
    return {"rules": [{"match": {"class": name}, **dict.fromkeys(slots, TENSOR)}]}


@pytest.mark.parametrize("name", IN_OUT)
def test_the_original_runs_between_two_quantizers(
    name: str, toolkit: Toolkit, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    layer, x = made(name)
    original, keys = copy.deepcopy(layer), list(layer.state_dict())
    with torch.no_grad():
        plain = original(x)
        toolkit.quantize(layer, recipe(name, "input", "output"), [x])
        found = layer(x)

        assert list(layer.state_dict()) == keys
        assert torch.equal(found, int8(original(int8(x)), amax=plain.abs().amax()))
        assert not torch.equal(found, plain)
        with quantizers_off(layer):
            assert same_bits(layer(x), plain)
    bittern.revert(layer)
    assert type(layer) is type(original)
    assert vars(layer).keys() == vars(original).keys()
    assert same_bits(layer(x), plain)


@pytest.mark.parametrize("name", [n for n in IN_OUT if "Pool" in n and "Max" in n])
def test_of_a_max_pool_with_indices_the_values_are_quantized(name: str, toolkit: Toolkit) -> None:
    _, x = made(name)
    layer = getattr(nn, name)(2, return_indices=True)
    original = copy.deepcopy(layer)
    toolkit.quantize(layer, recipe(name, "input", "output"), [x])

    values, indices = layer(x)
    expected, where = original(int8(x))
    assert torch.equal(indices, where)
    assert torch.equal(values, int8(expected, amax=original(x)[0].abs().amax()))


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_a_batch_norm_in_training_keeps_the_statistics_of_what_it_normalizes(
    name: str, toolkit: Toolkit
) -> None:
    layer, x = made(name)
    original = copy.deepcopy(layer)
    toolkit.quantize(layer, recipe(name, "input"), [x])
    assert torch.equal(layer.running_mean, torch.zeros(4))  # calibration runs in eval mode

    assert torch.equal(layer.train()(x), original.train()(int8(x)))
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.running_mean, original.running_mean)
    assert torch.equal(layer.running_var, original.running_var)


@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm", "GELU", "PReLU", "MaxPool1d"])
def test_gradients_are_those_of_the_original_at_the_quantized_input(
    name: str, toolkit: Toolkit
) -> None:
    layer, x = made(name)
    original = copy.deepcopy(layer)
    toolkit.quantize(layer, recipe(name, "input"), [x])
    mine, theirs = x.clone().requires_grad_(), int8(x).requires_grad_()

    layer(mine).square().sum().backward()
    original(theirs).square().sum().backward()

    assert torch.equal(mine.grad, theirs.grad)
    for ours, other in zip(layer.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad)


@pytest.mark.parametrize("slots", [("input",), ("output",), ("input", "output")])
def test_what_works_in_place_still_does(slots: tuple[str, ...], toolkit: Toolkit) -> None:
    _, x = made("ReLU")
    layer = nn.ReLU(inplace=True)
    toolkit.quantize(layer, recipe("ReLU", *slots), lambda m: m(x.clone()))
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    expected = int8(x).relu() if "input" in slots else x.relu()
    expected = int8(expected, amax=x.relu().amax()) if "output" in slots else expected

    returned = layer(given)

    assert returned is given
    assert torch.equal(given, expected)
    given.sum().backward()
    assert torch.equal(leaf.grad, (x > 0).float())


def test_a_model_is_quantized_at_the_layers_that_are_named(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    rules = [
        {"match": {"class": "Linear"}, "weight": "int8"},
        {"match": "2", "output": TENSOR},
        {"match": {"class": "LayerNorm"}, "input": TENSOR},
    ]
    plan = toolkit.plan(model, {"rules": rules})

    assert [e.path for e in plan.entries] == ["0.weight", "1.input", "2.output", "3.weight"]
