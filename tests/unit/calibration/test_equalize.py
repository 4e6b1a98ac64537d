"""Equalization: the function stays, and planted outliers make no difference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import CalibrationError
from bittern.nn import QuantModule, quantizers_off
from bittern.toolkit import Toolkit

RECIPE = {"extends": "int4", "algorithm": ["equalize", "max"]}


class Gated(nn.Module):
    """A norm, a gated MLP, and a linear that no producer can make up for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down, self.last = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        out: Tensor = self.last(x)
        return out


@torch.no_grad()
def gated(*, outliers: bool = False, dtype: torch.dtype = torch.float32) -> Gated:
    torch.manual_seed(0)
    model = Gated().eval()
    model.norm.weight.uniform_(0.5, 2)
    if outliers:
        model.norm.weight[::8] *= 30
        for linear in (model.gate, model.up):
            linear.weight[:, ::8] /= 30
        model.up.weight[3] *= 50
        model.up.bias[3] *= 50
        model.down.weight[:, 3] /= 50
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_function_stays(outliers: bool, toolkit: Toolkit) -> None:
    model, x = gated(outliers=outliers), batch()
    with torch.no_grad():
        expected = model(x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    toolkit.quantize(model, RECIPE, [x])
    with torch.no_grad(), quantizers_off(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"norm.weight", "gate.weight", "up.weight", "up.bias", "down.weight"}


def test_planted_outliers_make_no_difference(toolkit: Toolkit) -> None:
    x = batch()

    def error(algorithm: list[str], *, outliers: bool) -> float:
        model = gated(outliers=outliers)
        with torch.no_grad():
            expected = model(x)
            toolkit.quantize(model, {"extends": "int4", "algorithm": algorithm}, [x])
            return float((model(x) - expected).norm() / expected.norm())

    plain, planted = (error(["equalize", "max"], outliers=o) for o in (False, True))
    assert planted == pytest.approx(plain, rel=0.1)
    assert error(["max"], outliers=True) > 1.2 * plain


def test_it_ends_where_nothing_moves_any_more(toolkit: Toolkit) -> None:
    model = gated(outliers=True)
    toolkit.quantize(model, RECIPE, [batch()])
    made = model.up.weight.detach().square().sum(1) + model.up.bias.detach().square()
    ratio = made / model.down.weight.detach().square().sum(0)
    assert float(ratio.max() / ratio.min()) < 1.5


def test_scales_are_the_square_roots_of_the_ratios(toolkit: Toolkit) -> None:
    model = gated()
    gain, readers = model.norm.weight.detach().clone().double(), (model.gate, model.up)
    columns = torch.stack([r.weight.detach().double().square().sum(0) for r in readers]).sum(0)
    wanted = (gain.abs() / columns.sqrt()).sqrt()
    wanted /= wanted.log().mean().exp()
    gate = model.gate.weight.detach().clone()
    toolkit.quantize(model, RECIPE, [batch()])
    torch.testing.assert_close(
        model.gate.weight.detach() / gate, wanted.float().expand(64, 32), rtol=0.02, atol=0
    )


def test_channels_without_a_magnitude_stay(toolkit: Toolkit) -> None:
    model = gated()
    with torch.no_grad():
        model.norm.weight[4] = 0
        for linear in (model.gate, model.up):
            linear.weight[:, 9] = 0
    toolkit.quantize(model, RECIPE, [batch()])
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert float(model.norm.weight[4].detach()) == 0


def test_an_error_afterwards_puts_the_weights_back(toolkit: Toolkit) -> None:
    model = gated()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = {"extends": "int4", "algorithm": ["equalize", {"percentile": {"p": 200}}]}
    with pytest.raises(CalibrationError, match="percentile"):
        toolkit.quantize(model, recipe, [batch()])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_nothing_is_touched_whose_readers_are_not_planned(toolkit: Toolkit) -> None:
    model = gated()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    toolkit.quantize(model, {**RECIPE, "rules": [{"match": "up", "weight": None}]}, [batch()])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"up.weight", "up.bias", "down.weight"}
    assert not isinstance(model.up, QuantModule)


def test_without_example_inputs_nothing_happens(toolkit: Toolkit) -> None:
    model = gated()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    toolkit.quantize(model, RECIPE)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_recipe_that_ends_with_it_is_refused(toolkit: Toolkit) -> None:
    with pytest.raises(CalibrationError, match="no step after it"):
        toolkit.quantize(gated(), {"extends": "int4", "algorithm": "equalize"}, [batch()])
