"""Each measure against plain arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bittern as bt
from bittern.errors import DataError
from bittern.records import ModelAdapter
from bittern.runtime import prepare
from bittern.search.groups import DecisionGroup
from bittern.search.losses import divergence, loss_of
from bittern.search.sensitivity import METHODS, Probe, Sums
from bittern.toolkit import Toolkit

INT4 = {"rules": [{"match": {"class": ["Linear", "Conv2d"]}, "weight": "int4", "input": "int8"}]}


def quantized(toolkit: Toolkit, model: nn.Module, data: list[Any]) -> nn.Module:
    """Return a quantized copy."""
    found = copy.deepcopy(model)
    toolkit.quantize(found, INT4, data)
    return found


def measure(
    method: str, model: nn.Module, groups: list[tuple[str, ...]], batch: Any, **more: Any
) -> Sums:
    probe = Probe(
        model=model,
        groups=[DecisionGroup(members) for members in groups],
        adapter=ModelAdapter(logits=lambda output: output),
        **more,
    )
    ready = prepare(batch, model, probe.adapter, index=0)
    return METHODS[method](probe, ready, 0)


# --- layer ----------------------------------------------------------------------------------------


def test_the_layer_error_is_that_of_the_module_on_the_original_input(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    plain = make_mlp()
    model = quantized(toolkit, plain, batches)
    x = batches[0]

    found = measure("layer", model, [("up",), ("down",)], x)

    hidden = torch.relu(plain.norm(plain.up(x)))
    for name, given in (("up", x), ("down", hidden)):
        own, rounded = (m.get_submodule(name)(given).detach() for m in (plain, model))
        error, size = found[name]
        assert error == pytest.approx(float((rounded - own).double().square().sum()), rel=1e-5)
        assert size == pytest.approx(float(own.double().square().sum()), rel=1e-5)
        assert error > 0


def test_a_group_has_the_errors_of_its_members(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    model = quantized(toolkit, make_lm(), token_batches)
    names = [f"layers.0.{n}" for n in "qkv"]
    alone = measure("layer", model, [(name,) for name in names], token_batches[0])

    together = measure("layer", model, [tuple(names)], token_batches[0])

    ((error, size),) = together.values()
    assert error == pytest.approx(sum(alone[name][0] for name in names))
    assert size == pytest.approx(sum(alone[name][1] for name in names))


# --- gradient -------------------------------------------------------------------------------------


def test_the_gradient_score_is_half_of_the_squared_first_order_change(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    plain = make_mlp()
    model = quantized(toolkit, plain, batches)
    x, labels = batches[0], torch.tensor([0, 1, 2, 3, 0])

    found = measure("gradient", model, [("up",), ("down",)], (x, labels))

    up = plain.up(x).detach().requires_grad_()
    hidden = torch.relu(plain.norm(up))
    down = plain.down(hidden)
    loss = F.cross_entropy(down, labels, reduction="sum")
    by_up, by_down = torch.autograd.grad(loss, (up, down))
    for name, gradient, given, own in (
        ("up", by_up, x, up),
        ("down", by_down, hidden, down),
    ):
        difference = model.get_submodule(name)(given.detach()) - own
        wanted = (gradient * difference).sum(-1).square().sum() / 2
        score, count = found[name]
        assert score == pytest.approx(float(wanted.detach()), rel=1e-4)
        assert count == 5


def test_labels_that_are_ignored_change_nothing(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    model = quantized(toolkit, make_mlp(), batches)
    x = batches[0]
    some = torch.tensor([0, 1, -100, -100, -100])
    two = measure("gradient", model, [("down",)], (x[:2], some[:2]))
    five = measure("gradient", model, [("down",)], (x, some))
    assert five["down"][0] == pytest.approx(two["down"][0], rel=1e-4)


def test_a_loss_of_ones_own_is_used(toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]) -> None:
    plain = make_mlp()
    model = quantized(toolkit, plain, batches)
    x = batches[0]

    found = measure("gradient", model, [("down",)], x, loss=lambda output, batch: output.sum())

    hidden = torch.relu(plain.norm(plain.up(x)))
    change = (model.down(hidden) - plain.down(hidden)).sum(-1)
    assert found["down"][0] == pytest.approx(float(change.detach().square().sum() / 2), rel=1e-4)


def test_without_labels_the_gradients_agree_with_the_divergence(
    toolkit: Toolkit, make_mlp: Any
) -> None:
    """The Fisher information is the Hessian of the divergence: for small changes they are one."""
    data = [torch.randn(4096, 8, generator=torch.Generator().manual_seed(5))]
    model = copy.deepcopy(make_mlp())
    toolkit.quantize(model, "int8", data)
    groups = [("up",), ("down",)]

    gradient = measure("gradient", model, groups, data[0])
    kl = measure("kl", model, groups, data[0])

    for name in ("up", "down"):
        ours, theirs = (s[name][0] / s[name][1] for s in (gradient, kl))
        assert ours == pytest.approx(theirs, rel=0.1)


def test_modules_that_write_into_their_input_are_no_obstacle(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 16, 5)
    ).eval()
    data = [torch.randn(4, 3, 6, 6)]
    model = quantized(toolkit, plain, data)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    found = measure("gradient", model, [("0",), ("3",)], data[0])

    assert all(score > 0 for score, _ in found.values())


def test_of_a_convolution_the_channels_of_one_place_belong_together(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    data = [torch.randn(2, 3, 6, 6)]
    model = quantized(toolkit, plain, data)

    found = measure("gradient", model, [("0",)], data[0], loss=lambda output, batch: output.sum())

    change = (model[0](data[0]) - plain[0](data[0])).sum(1)
    assert found["0"][0] == pytest.approx(float(change.detach().square().sum() / 2), rel=1e-4)


def test_what_is_drawn_is_the_same_every_time_and_follows_the_model() -> None:
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(60000, 3)
    rows = logits.clone().requires_grad_()
    batch = prepare(logits, nn.Identity(), ModelAdapter(), index=0)

    first, count = loss_of(rows, batch, ModelAdapter(), index=3)
    again, _ = loss_of(rows, batch, ModelAdapter(), index=3)
    other, _ = loss_of(rows, batch, ModelAdapter(), index=4)

    assert count == 60000
    assert first == again
    assert first != other
    entropy = -float((logits[0].exp() * logits[0]).sum())
    assert float(first.detach()) / 60000 == pytest.approx(entropy, rel=0.02)


def test_targets_that_are_numbers_make_it_a_regression(toolkit: Toolkit) -> None:
    """Gradients and differences then estimate the same: half of the squared error."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).eval()
    x = torch.randn(4096, 8)
    model = copy.deepcopy(plain)
    toolkit.quantize(model, "int8", [x])
    batch = (x, torch.zeros(4096, 1))

    gradient = measure("gradient", model, [("0",), ("2",)], batch)
    kl = measure("kl", model, [("0",), ("2",)], batch)

    hidden = torch.tanh(plain[0](x))
    wanted = float((model[2](hidden) - plain[2](hidden)).detach().square().sum() / 2)
    assert kl["2"] == (pytest.approx(wanted, rel=1e-4), 4096)
    for name in ("0", "2"):
        assert gradient[name][0] == pytest.approx(kl[name][0], rel=0.15)


def test_labels_of_a_language_model_are_its_input_and_those_of_a_classifier_are_not() -> None:
    ids, logits = torch.randint(0, 8, (2, 5)), torch.randn(2, 5, 8)
    model, text = nn.Identity(), ModelAdapter()
    own, _ = loss_of(logits, prepare(ids, model, text, index=0), text, index=0)

    again = prepare({"input_ids": ids, "labels": ids}, model, text, index=0)
    assert loss_of(logits, again, text, index=0) == (own, 10)

    tagger = ModelAdapter(causal=False)
    tags, _ = loss_of(logits, again, tagger, index=0)
    wanted = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
    torch.testing.assert_close(tags, wanted)

    whole = prepare({"input_ids": ids, "labels": torch.tensor([3, 4])}, model, text, index=0)
    found, count = loss_of(logits[:, 0], whole, text, index=0)
    assert count == 2
    wanted = F.cross_entropy(logits[:, 0], torch.tensor([3, 4]), reduction="sum")
    torch.testing.assert_close(found, wanted)


def test_labels_of_pixels_are_classes_along_the_channels(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3)).eval()
    x, labels = torch.randn(2, 3, 7, 6), torch.randint(0, 6, (2, 5, 4))
    model = quantized(toolkit, plain, [x])

    found = measure("gradient", model, [("0",)], (x, labels))

    own = plain(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(own, labels, reduction="sum"), own)
    wanted = (gradient * (model(x) - own)).sum(1).square().sum() / 2
    assert found["0"] == (pytest.approx(float(wanted.detach()), rel=1e-4), 2 * 5 * 4)


@pytest.mark.parametrize("method", ["gradient", "kl"])
def test_one_number_without_targets_is_no_prediction(method: str, toolkit: Toolkit) -> None:
    x = torch.randn(4, 8)
    model = quantized(toolkit, nn.Sequential(nn.Linear(8, 1)), [x])
    with pytest.raises(DataError, match="one number") as caught:
        measure(method, model, [("0",)], x)
    assert "loss=" in str(caught.value.hint)


# --- divergence -----------------------------------------------------------------------------------


def test_the_divergence_is_that_of_a_model_with_only_one_group_quantized(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    plain = make_lm()
    model = quantized(toolkit, plain, token_batches)
    names = tuple(f"layers.1.{n}" for n in "qkv")

    found = measure("kl", model, [names], token_batches[0])

    alone = copy.deepcopy(plain)
    rule = {**INT4["rules"][0], "match": list(names)}
    toolkit.quantize(alone, {"rules": [{**rule, "match": {"name": list(names)}}]}, token_batches)
    wanted = toolkit.evaluate(alone, [token_batches[0]]).kl
    ((total, count),) = found.values()
    assert count == token_batches[0].numel()
    assert total / count == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 10.0])
def test_small_divergences_do_not_drown_in_rounding(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, 300, generator=generator)
    q = p + size * torch.randn(50, 300, generator=generator)

    found = divergence(p, q)

    log_p, log_q = (F.log_softmax(t.double(), -1) for t in (p, q))
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found.double(), wanted, rtol=5e-3, atol=1e-13)


def test_classes_that_are_ruled_out_have_no_divergence() -> None:
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert divergence(p, p) == 0
    assert torch.isfinite(divergence(p, p + 1)).all()


def test_padding_does_not_count(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    model = quantized(toolkit, make_lm(), token_batches)
    ids = token_batches[0]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0

    whole = measure("kl", model, [("layers.1.o",)], ids[:, :8])
    padded = measure("kl", model, [("layers.1.o",)], {"input_ids": ids, "attention_mask": mask})

    assert padded["layers.1.o"][1] == whole["layers.1.o"][1] == 24
    assert padded["layers.1.o"][0] == pytest.approx(whole["layers.1.o"][0], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_does_not_run_has_no_score(
    method: str, toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = make_mlp(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = quantized(toolkit, Half(), batches)
    found = measure(method, model, [("used.up",), ("idle",)], batches[0])
    assert set(found) == {"used.up"}


@pytest.mark.parametrize("method", METHODS)
def test_a_module_within_another_is_measured_with_it(method: str, toolkit: Toolkit) -> None:
    """Unquantized, torch's attention reads the weight of its projection and never calls it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    kinds = ["Linear", "MultiheadAttention"]
    recipe = {"rules": [{"match": {"class": kinds}, "weight": "int4", "input": "int8"}]}
    toolkit.quantize(layer, recipe, [x])

    (alone,) = measure(method, layer, [("self_attn",)], x).values()
    (both,) = measure(method, layer, [("self_attn", "self_attn.out_proj")], x).values()

    assert both[0] > alone[0] > 0
    assert both[1] == alone[1]


@pytest.mark.parametrize("method", METHODS)
def test_measuring_leaves_the_model_as_it_was(
    method: str, toolkit: Toolkit, make_mlp: Any, batches: list[Tensor], same_bits: Any
) -> None:
    model = quantized(toolkit, make_mlp(), batches).train()
    before = model(batches[0])

    measure(method, model, [("up",), ("down",)], batches[0])

    assert model.training
    assert same_bits(model(batches[0]), before)
    assert bt.modes_of(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(q.enabled for q in (model.up.quantizer("weight"), model.down.quantizer("input")))
