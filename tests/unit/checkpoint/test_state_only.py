"""States without weights: beside the weights they belong to, and beside no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bittern as bt
from bittern.convert import modes_of
from bittern.errors import CheckpointError
from bittern.nn import named_quantizers
from bittern.testing import run_fresh

RECIPES = ["int8", "int4", "nvfp4", "fp8-dynamic"]
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    model[1].register_buffer("steps", torch.tensor(3))
    return model.to(dtype).eval()


def saved(path: Path, recipe: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = build(0, dtype)
    bt.quantize(model, recipe, data=[X.to(dtype)])
    bt.save(model, path, state_only=True)
    return model


def in_fresh_process(path: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = build(5)
    model.load_state_dict(weights)
    bt.restore(model, path)
    found: torch.Tensor = model(X)
    return found.detach()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_belongs_to_its_own_weights(recipe: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "state", recipe)

    other = build(0)
    bt.restore(other, tmp_path / "state")

    assert torch.equal(other(X), model(X))
    tensors = load_file(tmp_path / "state" / "state.safetensors")
    assert not set(tensors) & set(build(0).state_dict())
    assert sum(t.numel() for n, t in tensors.items() if n.startswith("bittern.witness/")) < 200


def test_a_fresh_process_gets_the_same_bits(tmp_path: Path) -> None:
    model = saved(tmp_path / "state", "int8")
    weights = build(0).state_dict()

    found = run_fresh(in_fresh_process, str(tmp_path / "state"), weights)

    assert torch.equal(found, model(X).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_may_be_loaded_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(tmp_path / "state", "int8")

    other = build(0, dtype)
    bt.restore(other, tmp_path / "state")

    assert other[1].weight.dtype == dtype
    torch.testing.assert_close(other(X.to(dtype)).float(), model(X), atol=0.05, rtol=0.05)


def test_a_state_in_half_precision_fits_the_same_weights_in_float32(tmp_path: Path) -> None:
    saved(tmp_path / "state", "int8", torch.bfloat16)

    bt.restore(build(0, torch.bfloat16).float(), tmp_path / "state")
    bt.restore(build(0), tmp_path / "state")  # which rounds to the same


@pytest.mark.parametrize("changed", ["1.weight", "3.bias", "0.weight"])
def test_other_weights_are_refused_and_the_model_left_alone(changed: str, tmp_path: Path) -> None:
    saved(tmp_path / "state", "int8")
    other = build(0)
    with torch.no_grad():
        other.get_parameter(changed).mul_(1.5).add_(0.1)
    before = other(X)

    with pytest.raises(CheckpointError, match=f"{changed} is not the weight") as caught:
        bt.restore(other, tmp_path / "state")

    assert "calibration may have changed" in str(caught.value.hint)
    assert torch.equal(other(X), before)
    assert not list(named_quantizers(other))
    assert modes_of(other) == ()


def test_what_calibration_changed_has_to_be_saved_too(tmp_path: Path) -> None:
    model = saved(tmp_path / "state", "int8-smoothquant")

    with pytest.raises(CheckpointError, match="is not the weight"):
        bt.restore(build(0), tmp_path / "state")
    smoothed = build(9)
    smoothed.load_state_dict(model.state_dict())
    bt.restore(smoothed, tmp_path / "state")
    assert torch.equal(smoothed(X), model(X))


def test_a_model_that_was_quantized_otherwise_is_quantized_anew(tmp_path: Path) -> None:
    model = saved(tmp_path / "state", "int8")

    other = build(0)
    bt.quantize(other, "int4")
    bt.restore(other, tmp_path / "state")

    assert torch.equal(other(X), model(X))
    assert [mode.config["recipe"] for mode in modes_of(other)] == ["int8"]


def test_nan_in_weights_is_no_difference(tmp_path: Path) -> None:
    model = build(0)
    bt.quantize(model, "int8", data=[X])
    with torch.no_grad():
        model[3].bias[0] = torch.nan
    bt.save(model, tmp_path / "state", state_only=True)

    other = build(0)
    with torch.no_grad():
        other[3].bias[0] = torch.nan
    bt.restore(other, tmp_path / "state")

    assert torch.equal(other(X).isnan(), model(X).isnan())


def test_large_weights_and_those_of_eight_bits_are_sampled(tmp_path: Path) -> None:
    """2**25 is the first count whose last index float32 rounds to one beyond the end."""

    def build_large(first: float) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16))
        model[0].register_buffer("large", torch.zeros(2**25, dtype=torch.float16))
        model[0].large[-1] = first
        eight = torch.tensor([first, torch.nan, 2.0]).to(torch.float8_e4m3fn)
        model[0].register_buffer("eight", eight)
        return model

    model = build_large(1.0)
    bt.quantize(model, "int8", data=[X])
    bt.save(model, tmp_path / "state", state_only=True)

    bt.restore(build_large(1.0), tmp_path / "state")
    with pytest.raises(CheckpointError, match="is not the weight"):
        bt.restore(build_large(2.0), tmp_path / "state")
