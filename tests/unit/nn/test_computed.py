"""Weights that a module computes from others (parametrizations), and lazy layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bittern
from bittern.errors import ModelError
from bittern.nn import original_class, quantizers_off
from bittern.toolkit import Toolkit

from .reference import WEIGHT, int8

SameBits = Callable[[Tensor, Tensor], bool]
WEIGHTS = {"rules": [{"match": {"class": ["Linear", "LSTM"]}, "weight": WEIGHT}]}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def normalized(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    first, second = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)
    return nn.Sequential(
        parametrizations.weight_norm(first), nn.ReLU(), parametrizations.spectral_norm(second)
    ).eval()


def test_what_was_computed_is_quantized(toolkit: Toolkit, same_bits: SameBits) -> None:
    model = normalized()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    with torch.no_grad():
        before = model(X)
        plan = toolkit.quantize(model, WEIGHTS).plan

        hidden = nn.functional.linear(X, int8(original[0].weight, 0), original[0].bias).relu()
        expected = nn.functional.linear(hidden, int8(original[2].weight, 0))
        assert torch.equal(model(X), expected)
        assert list(model.state_dict()) == keys
        with quantizers_off(model):
            assert same_bits(model(X), before)
        twin = copy.deepcopy(model)
        assert same_bits(twin(X), model(X))
    assert plan.modules == ("0", "2")
    assert plan.skipped == {}
    assert plan.bytes_after == 8 * 6 + 6 * 4 + (6 + 4) * 4 + 6 * 4  # codes, scales, one bias
    bittern.revert(model)
    assert type(model[0]) is type(original[0])
    assert same_bits(model(X), before)


def test_gradients_reach_what_a_weight_is_computed_from(toolkit: Toolkit) -> None:
    model = normalized()
    toolkit.quantize(model, WEIGHTS)
    model(X).square().sum().backward()

    for parameter in model.parameters():
        assert bool(parameter.grad.any())


def test_a_plan_does_not_advance_spectral_normalization(toolkit: Toolkit) -> None:
    model = normalized().train()
    before = copy.deepcopy(model.state_dict())
    toolkit.quantize(model, WEIGHTS)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(X)
    assert not torch.equal(
        model.state_dict()["2.parametrizations.weight.0._u"],
        before["2.parametrizations.weight.0._u"],
    )


def test_a_state_with_computed_weights_comes_back(
    toolkit: Toolkit, same_bits: SameBits, tmp_path: Path
) -> None:
    model, fresh = normalized(), normalized(seed=1)
    toolkit.quantize(model, WEIGHTS)
    bittern.save(model, tmp_path / "state", toolkit=toolkit)
    bittern.restore(fresh, tmp_path / "state", toolkit=toolkit)

    with torch.no_grad():
        assert same_bits(fresh(X), model(X))


def test_the_computed_weight_is_exported_in_place_of_its_sources(
    toolkit: Toolkit, tmp_path: Path
) -> None:
    model = normalized()
    toolkit.quantize(model, WEIGHTS)
    toolkit.export(model, tmp_path / "out", format="safetensors")

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(tensors) == ["0.bias", "0.weight", "0.weight_scale", "2.weight", "2.weight_scale"]
    decoded = tensors["0.weight"] * tensors["0.weight_scale"]
    assert torch.equal(decoded, int8(model[0].weight, 0))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "apply",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: prune.random_unstructured(m, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_a_weight_that_a_hook_computes_is_reported(apply: Any, toolkit: Toolkit) -> None:
    # between two forwards it is what an earlier state gave, and no measure of the next
    model = nn.Sequential(apply(nn.Linear(8, 8)), nn.Linear(8, 8))
    plan = toolkit.plan(model, WEIGHTS)
    assert plan.modules == ("1",)
    assert "a hook makes it anew before every forward" in plan.skipped["0"]


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_an_lstm_with_computed_weights_runs_with_them_quantized(
    toolkit: Toolkit, same_bits: SameBits
) -> None:
    torch.manual_seed(0)
    model: Any = nn.LSTM(8, 5)
    plain = copy.deepcopy(model)
    parametrize.register_parametrization(model, "weight_hh_l0", Halved())
    with torch.no_grad():
        before = model(X)[0]
        plain.weight_ih_l0.copy_(int8(plain.weight_ih_l0, 0))
        plain.weight_hh_l0.copy_(int8(plain.weight_hh_l0 / 2, 0))
        toolkit.quantize(model, WEIGHTS)

        assert same_bits(model(X)[0], plain(X)[0])
        with quantizers_off(model):
            assert same_bits(model(X)[0], before)


def test_what_was_parametrized_after_conversion_stays_so_when_reverted(
    toolkit: Toolkit, same_bits: SameBits
) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    toolkit.quantize(model, WEIGHTS)
    with torch.no_grad():
        parametrize.register_parametrization(model[1], "weight", Halved())
        bittern.revert(model)
        halved = model(X)

        assert model[1].weight.grad_fn is None
        assert type(model[1]).__name__ == "ParametrizedLinear"
        assert same_bits(halved, model[1](model[0](X)))
        parametrize.remove_parametrizations(model[1], "weight", leave_parametrized=True)
        assert same_bits(model(X), halved)
    assert type(model[1]) is nn.Linear


def test_a_second_parametrization_after_conversion_is_noticed_too(toolkit: Toolkit) -> None:
    model = normalized()
    toolkit.quantize(model, WEIGHTS)
    parametrize.register_parametrization(model[0], "bias", Halved())

    with pytest.raises(ModelError, match="0: its bias was parametrized after"):
        bittern.revert(model)


def test_a_class_that_was_put_over_a_quantized_one_stays_over_the_original(
    toolkit: Toolkit,
) -> None:
    class Sharding:
        """What a framework mixes into classes of modules."""

    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    toolkit.quantize(model, WEIGHTS)
    quantized = type(model[0])
    sharded = type("Sharded" + quantized.__name__, (Sharding, quantized), {"kept": 1})
    for module in model:
        module.__class__ = sharded
    assert original_class(model[0]) is nn.Linear

    bittern.revert(model)

    assert type(model[0]) is type(model[1])
    assert type(model[0]).__name__ == "ShardedLinear"
    assert type(model[0]).__bases__ == (Sharding, nn.Linear)
    assert model[0].kept == 1
    toolkit.quantize(model, WEIGHTS)  # and once more, above it
    assert isinstance(model[0], Sharding)
    assert original_class(model[0]).__name__ == "ShardedLinear"
    bittern.revert(model)
    assert type(model[0]).__bases__ == (Sharding, nn.Linear)


def test_a_class_that_cannot_be_built_again_is_refused_before_anything_changes(
    toolkit: Toolkit,
) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    toolkit.quantize(model, WEIGHTS)
    base: Any = type(model[1])

    class Sharded(base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model[1].__class__ = Sharded

    with pytest.raises(ModelError, match=r"1: its class was changed to .*Sharded"):
        bittern.revert(model)
    assert "weight" in model[0].slots()


@pytest.mark.parametrize(
    ("lazy", "missing"),
    [
        (nn.LazyLinear, "1.weight"),
        (lambda n: nn.LazyConv1d(n, 3), "1.weight"),
        (lambda n: nn.LazyBatchNorm1d(affine=False), "1.running_mean"),
    ],
)
def test_a_lazy_layer_is_refused_until_it_has_run(
    lazy: Callable[[int], nn.Module], missing: str, toolkit: Toolkit
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), lazy(4))
    recipe = {"rules": [{"match": {"class": "Linear"}, "weight": "int8"}]}
    with pytest.raises(ModelError, match=f"{missing}: it has no shape yet"):
        toolkit.plan(model, recipe)

    model(X[None].expand(2, 3, 8) if missing != "1.weight" else X)
    assert "0" in toolkit.plan(model, recipe).modules


def test_a_lazy_linear_that_has_run_is_a_linear(toolkit: Toolkit) -> None:
    model: Any = nn.Sequential(nn.LazyLinear(4))
    model(X)
    toolkit.quantize(model, WEIGHTS)

    assert torch.equal(model(X), nn.functional.linear(X, int8(model[0].weight, 0), model[0].bias))
