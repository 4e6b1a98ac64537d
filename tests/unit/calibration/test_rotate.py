"""Rotation: the function stays, planted outliers vanish, and what cannot be rotated is left."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bittern.errors import CalibrationError
from bittern.nn import quantizers_off
from bittern.toolkit import Toolkit

RECIPE: dict[str, Any] = {
    "extends": "int8",
    "algorithm": ["rotate", "max"],
    "rules": [{"match": "head", "weight": None, "input": None}],
}
WIDTH, HEADS, KV, DIM, HIDDEN, WORDS = 32, 4, 2, 8, 48, 40


class Block(nn.Module):
    """Attention with grouped values and a gated MLP, each behind a norm."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, KV * DIM)
        self.v, self.o = nn.Linear(WIDTH, KV * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        batch, tokens, _ = x.shape
        q, k, v = (
            one(h).view(batch, tokens, -1, DIM).transpose(1, 2) for one in (self.q, self.k, self.v)
        )
        k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Two blocks between embeddings and a head; ``channels`` multiply the stream if given."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, *, gated: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.channels = nn.Parameter(torch.rand(WIDTH) + 0.5) if gated else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
            x = x if self.channels is None else x * self.channels
        out: Tensor = self.head(self.norm(x))
        return out


@torch.no_grad()
def decoder(*, norm: type[nn.Module] = nn.RMSNorm, tied: bool = False, **kwargs: Any) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(norm, **kwargs).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and (not tied or name != "norm.weight"):
            parameter.uniform_(0.5, 2)
    if tied:
        model.head.weight = model.words.weight
    return model


def ids() -> Tensor:
    return torch.randint(0, WORDS, (3, 12), generator=torch.Generator().manual_seed(1))


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@torch.no_grad()
def unquantized(model: nn.Module) -> Tensor:
    with quantizers_off(model):
        out: Tensor = model(ids())
        return out


def recipe(**options: Any) -> dict[str, Any]:
    return {**RECIPE, "algorithm": [{"rotate": options}, "max"]}


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_stays(
    norm: type[nn.Module], tied: bool, dtype: torch.dtype, toolkit: Toolkit
) -> None:
    model = decoder(norm=norm, tied=tied).to(dtype)
    expected, before = unquantized(model), copies(model)
    toolkit.quantize(model, RECIPE, [ids()])
    close = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(unquantized(model), expected, rtol=close, atol=close)
    weights = {n for n in before if n.endswith("weight") and n != "norm.weight"}
    assert weights <= changed(model, before)
    assert (model.head.weight is model.words.weight) == tied


def test_weights_are_products_with_one_orthogonal_matrix(toolkit: Toolkit) -> None:
    """The matrix is recovered from the embeddings, and must explain all other weights."""
    model = decoder().double()
    before = copies(model)
    toolkit.quantize(model, recipe(heads=False), [ids()])
    after = copies(model)
    matrix = torch.linalg.lstsq(before["words.weight"], after["words.weight"]).solution
    eye = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, WIDTH**-0.5))  # Hadamard
    torch.testing.assert_close(after["places.weight"], before["places.weight"] @ matrix)
    for norm, readers in (("norm1", "qkv"), ("norm2", ("gate", "up"))):
        gain = before[f"blocks.1.{norm}.weight"]
        for name in readers:
            key = f"blocks.1.{name}.weight"
            torch.testing.assert_close(after[key], before[key] * gain @ matrix)
        assert bool((after[f"blocks.1.{norm}.weight"] == 1).all())
    for name in ("o", "down"):
        key = f"blocks.1.{name}"
        torch.testing.assert_close(after[f"{key}.weight"], matrix.T @ before[f"{key}.weight"])
        torch.testing.assert_close(after[f"{key}.bias"], before[f"{key}.bias"] @ matrix)


def test_a_rotation_between_layer_norms_leaves_the_mean_alone(toolkit: Toolkit) -> None:
    model = decoder(norm=nn.LayerNorm).double()
    before = copies(model)
    toolkit.quantize(model, recipe(heads=False), [ids()])
    found = torch.linalg.lstsq(before["words.weight"], model.words.weight.detach()).solution
    ones = torch.ones(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(found @ ones, ones)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, eye, rtol=0, atol=1e-9)
    assert float(found.abs().max()) < 0.8  # no permutation: channels are mixed


def test_heads_alone_change_values_and_outputs_only(toolkit: Toolkit) -> None:
    model = decoder()
    expected, before = unquantized(model), copies(model)
    toolkit.quantize(model, recipe(residual=False), [ids()])
    torch.testing.assert_close(unquantized(model), expected, rtol=1e-4, atol=1e-5)
    assert changed(model, before) == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("v.weight", "v.bias", "o.weight")
    }


def inputs_of(model: Decoder) -> list[float]:
    """Return the largest magnitude of what linears behind norms read, over its root mean square."""
    found: list[float] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(float(args[0].abs().max() / args[0].square().mean().sqrt()))

    readers = [getattr(block, name) for block in model.blocks for name in ("q", "gate")]
    handles = [reader.register_forward_pre_hook(look) for reader in readers]
    unquantized(model)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def plant(model: Decoder) -> None:
    """Make one channel of the stream 30 times as large, and its part in gains 30 times smaller."""
    model.words.weight[:, 5] *= 30
    model.places.weight[:, 5] *= 30
    for block in model.blocks:
        for maker in (block.o, block.down):
            maker.weight[5] *= 30
            maker.bias[5] *= 30


def test_an_outlier_channel_vanishes(toolkit: Toolkit) -> None:
    model = decoder()
    plant(model)
    outlying = inputs_of(model)
    expected = unquantized(model)
    toolkit.quantize(model, RECIPE, [ids()])
    torch.testing.assert_close(unquantized(model), expected, rtol=1e-3, atol=1e-4)
    assert min(outlying) > 5
    assert max(inputs_of(model)) < 4


def test_quantizers_rotate_what_no_weight_can_take_up(toolkit: Toolkit) -> None:
    def error(rules: list[Any]) -> float:
        model = decoder()
        with torch.no_grad():
            for block in model.blocks:
                block.up.weight[3] *= 50
                block.down.weight[:, 3] /= 50
            expected = model(ids())
            steps = [*RECIPE["rules"], *rules]
            toolkit.quantize(model, {**RECIPE, "rules": steps}, [ids()])
            torch.testing.assert_close(unquantized(model), expected, rtol=1e-3, atol=1e-4)
            return float((model(ids()) - expected).norm() / expected.norm())

    both = {name: {"format": "int8", "rotate": "hadamard"} for name in ("weight", "input")}
    online = [{"match": {"name": "*.down"}, **both}]
    assert error(online) < 0.7 * error([])


def test_the_seed_decides(toolkit: Toolkit) -> None:
    def weights(seed: int) -> Tensor:
        model = decoder()
        toolkit.quantize(model, recipe(seed=seed), [ids()])
        return model.words.weight.detach()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_an_error_afterwards_puts_all_bits_back(toolkit: Toolkit) -> None:
    model = decoder(tied=True)
    before = copies(model)
    failing = {**RECIPE, "algorithm": ["rotate", {"percentile": {"p": 200}}]}
    with pytest.raises(CalibrationError, match="percentile"):
        toolkit.quantize(model, failing, [ids()])
    assert not changed(model, before)
    assert model.head.weight is model.words.weight


def left_alone(model: Decoder, toolkit: Toolkit, caplog: pytest.LogCaptureFixture) -> str:
    """Return what was logged about a stream that must not change."""
    before = copies(model)
    with caplog.at_level(logging.INFO, "bittern.calibration"):
        toolkit.quantize(model, recipe(heads=False), [ids()])
    assert not changed(model, before)
    return caplog.text


def test_a_factor_per_channel_leaves_the_stream_alone(
    toolkit: Toolkit, caplog: pytest.LogCaptureFixture
) -> None:
    said = left_alone(decoder(gated=True), toolkit, caplog)
    assert "32 channels of words.weight" in said
    assert "channels" in said.partition("words.weight: ")[2]


def test_a_gain_before_tied_embeddings_leaves_the_stream_alone(
    toolkit: Toolkit, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder(tied=True)
    torch.nn.init.uniform_(model.norm.weight, 0.5, 2)
    said = left_alone(model, toolkit, caplog)
    assert "norm.weight cannot move into words.weight" in said
    assert "give the head a weight of its own" in said


def test_what_did_not_run_leaves_the_stream_alone(
    toolkit: Toolkit, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder()
    model.spare = nn.Linear(WIDTH, 4)  # may read the stream on another day
    assert "spare.weight was not read" in left_alone(model, toolkit, caplog)


def test_a_model_that_returns_its_stream_is_left_alone(
    toolkit: Toolkit, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder()
    model.head = nn.Identity()  # type: ignore[assignment]
    assert "output" in left_alone(model, toolkit, caplog)


class Shy(nn.Module):
    """Does something else while it is looked at by tensors of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() if type(x) is Tensor else x


def test_other_outputs_than_before_put_all_bits_back(
    toolkit: Toolkit, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder()
    model.blocks.append(Shy())
    assert "all is put back" in left_alone(model, toolkit, caplog)


def test_block_by_block_only_heads_can_be_rotated(toolkit: Toolkit) -> None:
    model = decoder()
    before = copies(model)
    with pytest.raises(CalibrationError, match="goes through all blocks"):
        toolkit.quantize(model, RECIPE, [ids()], layerwise=True)
    assert not changed(model, before)
    whole, parted = decoder(), decoder()
    toolkit.quantize(whole, recipe(residual=False), [ids()])
    toolkit.quantize(parted, recipe(residual=False), [ids()], layerwise=True)
    assert changed(whole, before)
    assert not changed(parted, copies(whole))


def test_without_example_inputs_nothing_happens(toolkit: Toolkit) -> None:
    model = decoder()
    before = copies(model)
    dynamic = {"extends": "mxfp4", "algorithm": ["rotate", "max"]}
    toolkit.quantize(model, dynamic)
    assert not changed(model, before)


def test_a_recipe_that_ends_with_it_is_refused(toolkit: Toolkit) -> None:
    with pytest.raises(CalibrationError, match="no step after it"):
        toolkit.quantize(decoder(), {**RECIPE, "algorithm": "rotate"}, [ids()])
