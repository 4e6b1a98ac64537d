"""SmoothQuant: the function stays, bit for bit; the outliers go where they cost less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bittern.errors import CalibrationError
from bittern.nn import named_quantizers
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
SMOOTH = {"extends": "int8", "algorithm": ["smooth", "max"]}


def with_alpha(alpha: float) -> dict[str, Any]:
    return {"extends": "int8", "algorithm": [{"smooth": {"alpha": alpha}}, "max"]}


class Decoder(nn.Module):
    """One block as in Llama: grouped heads, a gated MLP, norms before both."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.size = width // heads
        self.embed = nn.Embedding(50, width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        kv = self.size * kv_heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, kv), nn.Linear(width, kv)
        self.gate, self.up = nn.Linear(width, 64), nn.Linear(width, 64)
        self.down = nn.Linear(64, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, _ = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(b, t, -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


FOLDED = {"q", "k", "v", "o", "gate", "up", "down"}


@torch.no_grad()
def decoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder().eval()
    for norm in (model.norm1, model.norm2):
        norm.weight[3], norm.weight[17] = 60, 25  # outliers, as trained models have them
    model.v.weight[5] *= 40
    model.up.weight[9] *= 40
    return model.to(dtype)


@torch.no_grad()
def convolutional(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(*layers).eval()
    model[1].weight[2], model[1].bias[2] = 50, 20
    model[3].weight[:, 2] /= 50
    model[1].running_mean.uniform_(-1, 1)
    return model.to(dtype)


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (2, 12), generator=generator) for _ in range(3)]


def images(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 9, 9, generator=generator).to(dtype) for _ in range(3)]


def unquantized(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the model computes with its quantizers off."""
    on = [q for _, q in named_quantizers(model) if q.enabled]
    for quantizer in on:
        quantizer.enabled = False
    with torch.no_grad():
        out: Tensor = model(x)
    for quantizer in on:
        quantizer.enabled = True
    return out


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


# --- the function stays ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_mlp_compute_what_they_did_bit_for_bit(
    dtype: torch.dtype, toolkit: Toolkit, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    model, data = decoder(dtype), tokens()
    with torch.no_grad():
        expected = model(data[0])
    before = weights(model)
    toolkit.quantize(model, SMOOTH, data)
    assert same_bits(unquantized(model, data[0]), expected)
    assert {f"{name}.weight" for name in FOLDED} < changed(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_compute_what_they_did_bit_for_bit(
    dtype: torch.dtype, toolkit: Toolkit, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    model, data = convolutional(dtype), images(dtype)
    with torch.no_grad():
        expected = model(data[0])
    before = weights(model)
    toolkit.quantize(model, SMOOTH, data)
    assert same_bits(unquantized(model, data[0]), expected)
    assert changed(model, before) == {"1.weight", "1.bias", "3.weight"}


def test_scales_are_powers_of_two(toolkit: Toolkit) -> None:
    model = decoder()
    before = weights(model)
    toolkit.quantize(model, SMOOTH, tokens())
    for name, parameter in model.named_parameters():
        ratio = (parameter / before[name]).detach()
        mantissa, _ = torch.frexp(ratio[ratio.isfinite()])
        assert (mantissa == 0.5).all(), name


# --- outliers are repaired ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "data"), [(decoder, tokens()), (convolutional, images())], ids=["decoder", "conv"]
)
def test_outliers_cost_far_less(
    make: Callable[[], nn.Module], data: list[Tensor], toolkit: Toolkit
) -> None:
    def error(recipe: str | dict[str, Any]) -> float:
        model = make()
        with torch.no_grad():
            expected = model(data[0])
            toolkit.quantize(model, recipe, data)
            return float((model(data[0]) - expected).norm() / expected.norm())

    assert error(SMOOTH) < 0.5 * error("int8")


def test_alpha_says_where_the_spread_goes(toolkit: Toolkit) -> None:
    """With 1 all channels of the input are alike, with 0 all columns of the weight."""

    def spreads(alpha: float) -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.logspace(-2, 2, 8))
            model[1].weight.mul_(torch.logspace(1, -1, 8))
        x = torch.randn(64, 8)
        toolkit.quantize(model, with_alpha(alpha), [x])
        with torch.no_grad():
            inputs = model[0](x).abs().amax(0)
        columns = model[1].weight.detach().abs().amax(0)
        return tuple(float(v.max() / v.min()) for v in (inputs, columns))  # type: ignore[return-value]

    assert spreads(1)[0] <= 2.0001  # scales are rounded to powers of two
    assert spreads(0)[1] <= 2.0001
    assert spreads(0.5)[0] < spreads(0)[0]
    assert spreads(0.5)[1] < spreads(1)[1]


def test_one_smoothing_leaves_nothing_to_a_second(toolkit: Toolkit) -> None:
    def smoothed(times: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.logspace(-2, 2, 8))
        recipe = {"extends": "int8", "algorithm": ["smooth"] * times + ["max"]}
        toolkit.quantize(model, recipe, [torch.randn(64, 8)])
        return weights(model)

    once, twice = smoothed(1), smoothed(2)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_channels_that_are_zero_stay_alone(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        model[0].weight[2] = model[0].bias[2] = 0
        model[1].weight[:, 5] = 0
    before = weights(model)
    toolkit.quantize(model, SMOOTH, [torch.randn(16, 8)])
    assert torch.equal(model[0].weight[[2, 5]], before["0.weight"][[2, 5]])
    assert all(p.isfinite().all() for p in model.parameters())


# --- what is left alone ---------------------------------------------------------------------------


def test_tied_weights_are_not_folded(make_lm: Make, toolkit: Toolkit) -> None:
    model = make_lm(tied=True)
    before = weights(model)
    generator = torch.Generator().manual_seed(2)
    data = [torch.randint(0, 32, (3, 12), generator=generator)]
    toolkit.quantize(model, SMOOTH, data)
    assert model.head.weight is model.embed.weight
    assert not {"embed.weight", "norm.weight", "norm.bias"} & changed(model, before)


def test_consumers_that_are_tensors_of_a_module_are_left_alone(toolkit: Toolkit) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 2)
            self.up = nn.Parameter(torch.randn(2, 8, 16))
            self.down = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            every = (h @ self.up).relu() @ self.down
            return (every * self.router(h).softmax(-1).t()[..., None]).sum(0)

    torch.manual_seed(0)
    model = Experts().eval()
    before = weights(model)
    toolkit.quantize(model, SMOOTH, [torch.randn(16, 8)])
    assert changed(model, before) == set()


def test_a_consumer_that_the_recipe_skips_keeps_the_whole_fold_away(toolkit: Toolkit) -> None:
    model = decoder()
    before = weights(model)
    toolkit.quantize(model, {**SMOOTH, "skip": ["k"]}, tokens())
    assert not {"norm1.weight", "q.weight", "k.weight"} & changed(model, before)
    assert {"norm2.weight", "gate.weight", "down.weight"} <= changed(model, before)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_out_of_range(alpha: float, toolkit: Toolkit) -> None:
    model = decoder()
    before = weights(model)
    with pytest.raises(CalibrationError, match="alpha is") as caught:
        toolkit.quantize(model, with_alpha(alpha), tokens())
    assert "between 0 and 1" in (caught.value.hint or "")
    assert changed(model, before) == set()


def _iterator() -> Iterator[Tensor]:
    yield from tokens()


def _function(model: nn.Module) -> None:
    model(tokens()[0])


@pytest.mark.parametrize("data", [_function, _iterator()], ids=["function", "iterator"])
def test_data_that_the_model_cannot_be_traced_on(data: Any, toolkit: Toolkit) -> None:
    with pytest.raises(CalibrationError, match="a batch that the model can be traced on") as caught:
        toolkit.quantize(decoder(), SMOOTH, data)
    assert "as a list, a DataLoader" in (caught.value.hint or "")


def test_no_data(toolkit: Toolkit) -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        toolkit.quantize(decoder(), SMOOTH)


@torch.no_grad()
def test_nan_is_named_and_nothing_is_folded(toolkit: Toolkit) -> None:
    model = decoder()
    model.embed.weight[7] = float("nan")
    data = [torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 7)]
    before = weights(model)
    with pytest.raises(CalibrationError, match="NaN or Inf in batch 1"):
        toolkit.quantize(model, SMOOTH, data)
    assert {n for n in changed(model, before) if n != "embed.weight"} == set()


def test_a_later_step_that_fails_gives_the_weights_back(toolkit: Toolkit) -> None:
    model = decoder()
    before = weights(model)
    recipe = {"extends": "int8-smoothquant", "algorithm": ["smooth", {"percentile": {"p": 101}}]}
    with pytest.raises(CalibrationError, match="101"):
        toolkit.quantize(model, recipe, tokens())
    assert not changed(model, before)
    assert not list(named_quantizers(model))


def test_undone_it_is_plain_int8_and_redone_smoothed(
    toolkit: Toolkit, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    """Moving the scales back and forth by hand gives what the recipes give, bit for bit."""
    plain, smoothed, data = decoder(), decoder(), tokens()
    toolkit.quantize(plain, "int8", data)
    toolkit.quantize(smoothed, SMOOTH, data)
    expected, after = plain(data[0]).detach(), smoothed(data[0]).detach()
    moved = weights(smoothed)

    undone = decoder()
    with torch.no_grad():
        for name, parameter in undone.named_parameters():
            ratio = moved[name] / parameter
            exponents = ratio[parameter != 0].log2()
            assert torch.equal(exponents, exponents.round()), name
            parameter.copy_(moved[name])
            parameter.copy_(torch.where(parameter != 0, parameter / ratio, parameter))
    toolkit.quantize(undone, "int8", data)
    assert same_bits(undone(data[0]).detach(), expected)

    redone = decoder()
    with torch.no_grad():
        for name, parameter in redone.named_parameters():
            parameter.copy_(moved[name])
    toolkit.quantize(redone, "int8", data)
    assert same_bits(redone(data[0]).detach(), after)
    assert not torch.equal(expected, after)
