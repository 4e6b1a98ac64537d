"""A low-rank branch beside a quantized weight: what it computes, and that it can be taken away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bittern as bt
from bittern.errors import ExportError, NumericsError
from bittern.nn import QuantModule, TensorQuantizer, quantizers_off
from bittern.nn.lowrank import LowRank, branch_of
from bittern.numerics import fake_quantize
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
RECIPE = "nvfp4"


def inputs() -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 8)).eval()


def branched(toolkit: Toolkit, recipe: object = RECIPE, rank: int = 2) -> nn.Sequential:
    """Return a quantized model whose first layer has a branch."""
    model = model_of()
    toolkit.quantize(model, recipe, [inputs()])
    add_branch(model[0], rank)
    return model


def add_branch(layer: nn.Module, rank: int = 2) -> None:
    assert isinstance(layer, QuantModule)
    quantizer = weight_quantizer(layer)
    u, s, vt = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    quantizer.set_low_rank(LowRank(u[:, :rank] * s[:rank], vt[:rank]))
    quantizer.calibrate_on(layer.weight)


def weight_quantizer(layer: nn.Module) -> TensorQuantizer:
    assert isinstance(layer, QuantModule)
    found = layer.quantizer("weight")
    assert found is not None
    return found


def branch(layer: nn.Module) -> LowRank:
    transforms = weight_quantizer(layer).transforms
    assert transforms is not None
    assert transforms.low_rank is not None
    return transforms.low_rank


def rest(layer: nn.Module) -> Tensor:
    """Return the rounded rest of a weight, by the numerics alone."""
    own = branch(layer)
    value = layer.weight.detach() - own.left @ own.right
    return fake_quantize(value, weight_quantizer(layer).spec)


@torch.no_grad()
def test_the_rest_is_quantized_and_the_branch_reads_the_input_as_it_is(toolkit: Toolkit) -> None:
    layer, x = branched(toolkit)[0], inputs()
    own = branch(layer)
    assert (own.left @ own.right).shape == layer.weight.shape
    rounded = layer.input_quantizer(x)
    assert not torch.equal(rounded, x)
    expected = F.linear(rounded, rest(layer), layer.bias) + x @ own.right.t() @ own.left.t()
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_a_pre_scale_of_the_input_holds_for_the_branch_too(toolkit: Toolkit) -> None:
    layer, x = branched(toolkit)[0], inputs()
    scale = torch.linspace(0.5, 2, 16)
    layer.input_quantizer.set_pre_scale(scale)
    own = branch(layer)
    expected = F.linear(layer.input_quantizer(x), rest(layer), layer.bias)
    expected += (x * scale) @ own.right.t() @ own.left.t()
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_without_its_quantizers_the_model_computes_what_it_did_bit_for_bit(
    toolkit: Toolkit,
) -> None:
    model, x = branched(toolkit), inputs()
    with quantizers_off(model):
        assert torch.equal(model(x), model_of()(x))
    assert not torch.equal(model(x), model_of()(x))


@torch.no_grad()
def test_reverting_gives_back_the_model(toolkit: Toolkit) -> None:
    model, fresh = branched(toolkit), model_of()
    bt.revert(model)
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model.named_buffers()] == []
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )


@torch.no_grad()
def test_state_dict_and_parameters_stay_those_of_the_original(toolkit: Toolkit) -> None:
    model = branched(toolkit)
    assert list(model.state_dict()) == list(model_of().state_dict())
    assert len(list(model.parameters())) == 4


@torch.no_grad()
def test_a_copy_computes_the_same_with_tensors_of_its_own(toolkit: Toolkit) -> None:
    model, x = branched(toolkit), inputs()
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    branch(other[0]).left.zero_()
    assert bool(branch(model[0]).left.any())


@torch.no_grad()
def test_it_moves_to_another_dtype_with_the_model(toolkit: Toolkit) -> None:
    model, x = branched(toolkit), inputs()
    expected = model(x)
    model.to(torch.bfloat16)
    assert branch(model[0]).left.dtype == torch.bfloat16
    torch.testing.assert_close(model(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("step", ["plain", "fold", "compress"])
@torch.no_grad()
def test_save_and_restore_keep_it(step: str, toolkit: Toolkit, tmp_path: Path) -> None:
    model, x = branched(toolkit), inputs()
    expected = model(x)
    if step != "plain":
        getattr(bt, step)(model)
        torch.testing.assert_close(model(x), expected)
    bt.save(model, tmp_path / "state")
    fresh = nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 8)).eval()
    bt.restore(fresh, tmp_path / "state")
    assert torch.equal(fresh(x), model(x))


@torch.no_grad()
def test_reverting_a_packed_weight_adds_the_branch_again(toolkit: Toolkit) -> None:
    model = branched(toolkit, rank=8)
    own = branch(model[0])
    expected = rest(model[0]) + own.left @ own.right
    bt.compress(model)
    bt.revert(model)
    torch.testing.assert_close(model[0].weight.detach(), expected)


@torch.no_grad()
def test_it_is_off_while_its_weight_is_observed(toolkit: Toolkit) -> None:
    layer = branched(toolkit)[0]
    assert branch_of(layer) is branch(layer)
    weight_quantizer(layer).observer = object()  # type: ignore[assignment]
    assert branch_of(layer) is None


def test_gradients_reach_input_and_weight(toolkit: Toolkit) -> None:
    layer, x = branched(toolkit)[0], inputs().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert bool(x.grad.isfinite().all())


def test_export_refuses_it(toolkit: Toolkit, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="low-rank branch"):
        bt.export(branched(toolkit), tmp_path / "out", format="safetensors")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_taking_it_away_gives_the_plain_quantized_layer(toolkit: Toolkit) -> None:
    model, x = branched(toolkit), inputs()
    quantizer = weight_quantizer(model[0])
    quantizer.set_low_rank(None)
    quantizer.calibrate_on(model[0].weight)
    plain = model_of()
    toolkit.quantize(plain, RECIPE, [x])
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(("left", "right"), [((3, 2), (3, 4)), ((3,), (3, 4)), ((2, 3, 2), (2, 4))])
def test_factors_without_a_product_are_refused(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    with pytest.raises(NumericsError, match="no product"):
        LowRank(torch.ones(left), torch.ones(right))


def test_factors_with_nan_are_refused() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        LowRank(torch.full((3, 2), torch.nan), torch.ones(2, 4))
