"""Reverting gives the original model back, exactly, from every state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.config import load_recipe
from bittern.convert import modes_of, revert
from bittern.nn import named_quantizers
from bittern.nn.packed import PackedWeight
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
SameBits = Callable[[Tensor, Tensor], bool]

RECIPES = sorted(
    path.stem
    for path in (Path(__file__).parents[3] / "core/src/bittern/builtin/recipes").glob("*.yaml")
    if path.stem != "base"
)


class Zoo(nn.Module):
    """A model of many kinds of modules, with hooks and attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.up = nn.ConvTranspose1d(64, 64, 1, groups=2)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
        self.memory = nn.LSTM(64, 32, bidirectional=True, batch_first=True)
        self.mix = nn.Bilinear(64, 64, 32)
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, 5)
        self.out.note = "an attribute of the object"
        self.out.register_forward_hook(lambda module, args, output: output + 1)
        self.conv.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.up(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = self.encoder(x + self.attention(x, x, x)[0])
        x, _ = self.memory(x)
        return self.out(self.norm(self.mix(x, x)))


EVERYTHING = {
    "class": [
        "Embedding",
        "Conv1d",
        "ConvTranspose1d",
        "MultiheadAttention",
        "Linear",
        "LSTM",
        "Bilinear",
    ]
}


@pytest.fixture
def zoo() -> Zoo:
    torch.manual_seed(0)
    return Zoo().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))


def facts(model: nn.Module) -> dict[str, Any]:
    """Return all about a model that is no number."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": {name: id(b) for name, b in model.named_buffers()},
        "keys": list(model.state_dict()),
        "hooks": {name: list(m._forward_hooks.values()) for name, m in model.named_modules()},
        "attributes": {
            name: {k for k in vars(m) if k != "_flat_weights"} for name, m in model.named_modules()
        },
    }


def assert_original(
    model: nn.Module, before: dict[str, Any], *, replaced: Set[str] = frozenset()
) -> None:
    """Compare with `facts` from before; ``replaced`` parameters may be other objects."""
    after = facts(model)
    for name in replaced:
        before["parameters"][name] = after["parameters"][name]
    assert after == before
    assert modes_of(model) == ()


def rewrites(recipe: str, toolkit: Toolkit) -> bool:
    """Whether a recipe's algorithms write other weights, which stay written."""
    names = [step.name for step in toolkit.recipe(recipe).algorithm]
    steps = [toolkit.registry.algorithms.get(name) for name in names]
    return any("hessian" in step.needs or step.name == "equalize" for step in steps)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_undone_to_the_last_bit(
    recipe: str, zoo: Zoo, ids: Tensor, toolkit: Toolkit, same_bits: SameBits
) -> None:
    before = facts(zoo)
    with torch.no_grad():
        expected = zoo(ids)
        toolkit.quantize(zoo, recipe, [ids])
        assert not torch.equal(zoo(ids), expected)
        revert(zoo)
        assert same_bits(zoo(ids), expected) or rewrites(recipe, toolkit)
    assert_original(zoo, before)


@pytest.mark.parametrize("weight", ["int8", {"format": "int4", "then": "fp8"}], ids=str)
def test_every_kind_of_module_is_undone(
    weight: Any, zoo: Zoo, ids: Tensor, toolkit: Toolkit, same_bits: SameBits
) -> None:
    before = facts(zoo)
    rule = {"match": EVERYTHING, "weight": weight, "input": "int8", "output": "int8"}
    with torch.no_grad():
        expected = zoo(ids)
        toolkit.quantize(zoo, {"rules": [rule]}, [ids])
        assert len({type(m).__name__ for m in zoo.modules() if "Quant" in type(m).__name__}) > 7
        revert(zoo)
        assert same_bits(zoo(ids), expected)
    assert_original(zoo, before)
    revert(zoo)  # again, which changes nothing
    assert_original(zoo, before)


def test_learned_ranges_go(zoo: Zoo, ids: Tensor, toolkit: Toolkit) -> None:
    before = facts(zoo)
    toolkit.quantize(zoo, "int8", [ids])
    for _, quantizer in named_quantizers(zoo):
        quantizer.learn()
    assert list(zoo.state_dict()) != before["keys"]
    revert(zoo)
    assert_original(zoo, before)


def test_a_weight_that_was_trained_stays_trained(make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    before = facts(model)
    toolkit.quantize(model, "int8-weight-only")
    model(torch.randn(2, 8)).sum().backward()
    with torch.no_grad():
        model.up.weight -= model.up.weight.grad
    trained = model.up.weight.detach().clone()
    revert(model)
    assert_original(model, before)
    assert torch.equal(model.up.weight, trained)


@pytest.mark.parametrize("keep", [True, False])
def test_folded_weights(
    keep: bool, zoo: Zoo, ids: Tensor, toolkit: Toolkit, same_bits: SameBits
) -> None:
    before = facts(zoo)
    rule = {"match": EVERYTHING, "weight": "int8"}
    with torch.no_grad():
        plain = zoo(ids)
        toolkit.quantize(zoo, {"rules": [rule]})
        rounded = zoo(ids)
        toolkit.apply_mode(zoo, "fold", {"keep": keep})
        revert(zoo)
        found = zoo(ids)
    assert_original(zoo, before)
    assert same_bits(found, plain) if keep else torch.allclose(found, rounded, atol=1e-5)


@pytest.mark.parametrize("weight", ["int8", {"format": "int4", "then": "fp8"}], ids=str)
def test_packed_weights_become_plain_and_rounded(
    weight: Any, zoo: Zoo, ids: Tensor, toolkit: Toolkit
) -> None:
    before = facts(zoo)
    toolkit.quantize(zoo, {"rules": [{"match": EVERYTHING, "weight": weight}]})
    with torch.no_grad():
        rounded = zoo(ids)
        folded = copy.deepcopy(zoo)
        toolkit.apply_mode(folded, "fold")
        toolkit.apply_mode(zoo, "compress")
        replaced = {name for name, p in zoo.named_parameters() if isinstance(p, PackedWeight)}
        assert "encoder.linear1.weight" in replaced
        revert(zoo)
        assert torch.allclose(zoo(ids), rounded, atol=1e-5)
    for name, parameter in zoo.named_parameters():
        assert type(parameter) is nn.Parameter, name
        assert torch.equal(parameter, folded.get_parameter(name)), name
    assert_original(zoo, before, replaced=replaced)


def test_tied_weights_are_tied_again(make_lm: Make, toolkit: Toolkit) -> None:
    model = make_lm(tied=True)
    spec = {"format": "int8", "granularity": "tensor"}
    toolkit.quantize(
        model, {"rules": [{"match": {"class": ["Linear", "Embedding"]}, "weight": spec}]}
    )
    toolkit.apply_mode(model, "compress")
    revert(model)
    assert model.head.weight is model.embed.weight
    assert type(model.head.weight) is nn.Parameter


def test_all_recipes_that_core_ships_are_tested(toolkit: Toolkit) -> None:
    for name in RECIPES:
        assert load_recipe(name, lookup=toolkit.registry.recipes.get).name == name
    assert len(RECIPES) >= 16
