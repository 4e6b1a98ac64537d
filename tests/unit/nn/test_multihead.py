"""nn.MultiheadAttention with every option, off and on, and the fused layers around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.unit.nn.reference import TENSOR, WEIGHT, int8
from torch import Tensor, nn

from bittern.convert import revert
from bittern.errors import NumericsError
from bittern.nn import QuantModule, named_quantizers, quantizers_off
from bittern.toolkit import Toolkit

SameBits = Callable[[Tensor, Tensor], bool]
E, H, L, S, N = 8, 2, 5, 6, 3
WEIGHTS = {"in_proj", "q_proj", "k_proj", "v_proj"}
DYNAMIC = {**TENSOR, "dynamic": True}


def recipe(match: str, *slots: str) -> dict[str, Any]:
    specs = {slot: WEIGHT if slot in WEIGHTS else DYNAMIC for slot in slots}
    return {"rules": [{"match": match, "slots": specs}]}


class Looking:
    """An observer that takes down shapes; while it looks, a quantizer passes its tensor on."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def observe(self, x: Tensor, experts: object = None) -> None:
        self.shapes.append(tuple(x.shape))

    def first_bad_batch(self) -> int | None:
        return None


def look(model: nn.Module) -> dict[str, Looking]:
    """Let every quantizer only look: its forward is the quantized one, its numbers are exact."""
    found = {name.rpartition(".")[2]: (q, Looking()) for name, q in named_quantizers(model)}
    for quantizer, looking in found.values():
        quantizer.observer = looking
    return {name: looking for name, (_, looking) in found.items()}


# --- every option computes what torch computes ----------------------------------------------------

WORDS = ("batched", "batch_first", "appended", "wide", "bias")
MODULES = [how for n in range(6) for how in itertools.combinations(WORDS, n)]


def calls(*, batched: bool) -> Iterator[dict[str, Any]]:
    """Every way to call an attention; each row keeps a column that it may attend to."""
    torch.manual_seed(1)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, -2:] = True
    flat = torch.rand(L, S) > 0.5
    deep = torch.rand(N * H if batched else H, L, S) > 0.5
    flat[:, 0] = deep[:, :, 0] = False
    causal = torch.ones(L, S).triu(1).bool()
    paddings = (None, padding if batched else padding[1])
    masks = (None, flat, flat * -2.0, deep, deep * -2.0, causal)
    for pad, mask, weights in itertools.product(paddings, masks, (None, True, False)):
        padding = pad
        if pad is not None and mask is not None and mask.is_floating_point():
            padding = pad * -3.0  # torch wants both of one kind
        for hint in (False, True) if mask is causal else (False,):
            yield {
                "key_padding_mask": padding,
                "attn_mask": mask,
                "need_weights": weights is not None,
                "average_attn_weights": bool(weights),
                "is_causal": hint,
            }


@pytest.mark.parametrize("slots", [("query",), ("p",)])
@pytest.mark.parametrize("how", MODULES, ids=lambda how: "-".join(how) or "plain")
def test_every_option_computes_what_the_original_does(
    slots: tuple[str, ...], how: tuple[str, ...], toolkit: Toolkit
) -> None:
    batched, batch_first, appended, wide, bias = (word in how for word in WORDS)
    torch.manual_seed(0)
    options = {"kdim": 6, "vdim": 7} if wide else {}
    module = nn.MultiheadAttention(
        E,
        H,
        bias=bias,
        add_bias_kv=appended,
        add_zero_attn=appended,
        batch_first=batch_first,
        **options,
    ).eval()
    widths = (E, *options.values()) if wide else (E, E, E)
    inputs = [torch.randn(N, n, w) for n, w in zip((L, S, S), widths, strict=True)]
    if not batched:
        inputs = [x[0] for x in inputs]
    elif not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    every = list(calls(batched=batched))
    expected = [module(*inputs, **call) for call in every]
    model = nn.ModuleDict({"a": module})
    toolkit.quantize(model, recipe("a", *slots))
    seen = look(model)

    for call, (output, weights) in zip(every, expected, strict=True):
        got, probabilities = module(*inputs, **call)
        torch.testing.assert_close(got, output, atol=1e-5, rtol=1e-4)
        assert (probabilities is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(probabilities, weights)
    assert all(len(looking.shapes) == len(every) for looking in seen.values())


def test_a_query_that_may_attend_to_nothing_gives_what_torch_gives(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H)}).eval()
    x = torch.randn(L, N, E)
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[2] = True
    options = [{"attn_mask": mask, "need_weights": need} for need in (True, False)]
    expected = [model["a"](x, x, x, **option)[0] for option in options]
    toolkit.quantize(model, recipe("a", "p"))
    look(model)

    for option, output in zip(options, expected, strict=True):
        found = model["a"](x, x, x, **option)[0]
        torch.testing.assert_close(found, output, equal_nan=True)


@torch.no_grad()
def test_dropout_falls_on_the_probabilities_in_training_only(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, dropout=0.5)})
    toolkit.quantize(model, recipe("a", "p"))
    x = torch.randn(40, N, E)
    weights = model["a"](x, x, x, average_attn_weights=False)[1]
    assert 0.45 < float((weights == 0).float().mean()) < 0.55
    kept = weights[weights != 0].sum() / (N * H * 40)
    assert float(kept) == pytest.approx(1, abs=0.05)

    model.eval()
    assert bool((model["a"](x, x, x)[1] > 0).all())


def test_a_causal_hint_without_a_mask_is_refused_as_torch_refuses_it(toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H)})
    toolkit.quantize(model, recipe("a", "query"))
    x = torch.randn(L, N, E)
    with pytest.raises(RuntimeError, match="attn_mask, which is missing"):
        model["a"](x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, batch_first=True)})
    toolkit.quantize(model, recipe("a", "query"))
    x = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(NumericsError, match=r"^a: nested tensors"):
        model["a"](x, x, x)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_of_integers_are_refused_as_torch_refuses_them(name: str, toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H)})
    x = torch.randn(L, N, E)
    masks = {"attn_mask": torch.ones(L, L), "key_padding_mask": torch.ones(N, L)}
    with pytest.raises(AssertionError, match="bool and floating"):
        model["a"](x, x, x, **{name: masks[name].byte()})
    toolkit.quantize(model, recipe("a", "in_proj"))
    with pytest.raises(NumericsError, match=r"^a: a mask of torch\.uint8"):
        model["a"](x, x, x, **{name: masks[name].byte()})


# --- quantized ------------------------------------------------------------------------------------


def by_hand(module: Any, inputs: list[Tensor], on: set[str]) -> Tensor:
    """Attention of ``(batch, tokens, width)``, one head after the other, quantized by hand."""

    def act(name: str, x: Tensor) -> Tensor:
        return int8(x) if name in on else x

    def matrix(name: str, w: Tensor) -> Tensor:
        return int8(w, 0) if name in on else w

    weights = (
        matrix("in_proj", module.in_proj_weight).split(E)
        if module.in_proj_weight is not None
        else [matrix(f"{n}_proj", getattr(module, f"{n}_proj_weight")) for n in "qkv"]
    )
    names = ("query", "key", "value")
    biases = module.in_proj_bias.split(E)
    projected = [
        act(name, x) @ w.T + b for name, x, w, b in zip(names, inputs, weights, biases, strict=True)
    ]
    d = E // H
    q, k, v = (act(name, x) for name, x in zip("qkv", projected, strict=True))
    cut = [slice(h * d, (h + 1) * d) for h in range(H)]
    p = torch.stack([torch.softmax(q[..., c] @ k[..., c].mT / math.sqrt(d), -1) for c in cut], 1)
    p = act("p", p)
    out = torch.cat([p[:, h] @ v[..., c] for h, c in enumerate(cut)], -1)
    if "out_proj" in on:
        out = int8(out) @ int8(module.out_proj.weight, 0).T + module.out_proj.bias
    else:
        out = out @ module.out_proj.weight.T + module.out_proj.bias
    return act("output", out)


EVERY = ("query", "key", "value", "q", "k", "v", "p", "output")


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
def test_every_slot_quantizes_what_it_says(wide: bool, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    options = {"kdim": 6, "vdim": 7} if wide else {}
    module = nn.MultiheadAttention(E, H, batch_first=True, **options).eval()
    module.in_proj_bias.normal_()
    widths = (E, 6, 7) if wide else (E, E, E)
    inputs = [torch.randn(N, n, w) for n, w in zip((L, S, S), widths, strict=True)]
    weights = ("q_proj", "k_proj", "v_proj") if wide else ("in_proj",)
    exact = module(*inputs)[0]
    model = nn.ModuleDict({"a": module})
    for slots in [*((slot,) for slot in (*EVERY, *weights)), (*EVERY, *weights)]:
        revert(model)
        toolkit.quantize(model, recipe("a", *slots))
        found = module(*inputs)[0]
        torch.testing.assert_close(found, by_hand(module, inputs, set(slots)))
        assert not torch.allclose(found, exact, atol=1e-7), f"{slots} change nothing"


@torch.no_grad()
def test_the_second_of_a_chain_works_without_the_first(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, batch_first=True)}).eval()
    chain = [TENSOR, {"format": "int2", "granularity": "tensor"}]
    toolkit.quantize(model, {"rules": [{"match": "a", "slots": {"in_proj": chain}}]})
    weight = model["a"].quantizer("in_proj")
    weight.enabled = False
    x = torch.randn(N, L, E)
    found = model["a"](x, x, x)[0]
    exact = model["a"].in_proj_weight.data.clone()
    model["a"].in_proj_weight.data.copy_(weight.then(exact))
    with quantizers_off(model):
        torch.testing.assert_close(found, model["a"](x, x, x)[0])


def test_the_output_projection_is_a_layer_of_its_own(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, batch_first=True)}).eval()
    x = torch.randn(N, L, E)
    specs = {"weight": WEIGHT, "input": DYNAMIC}
    plan = toolkit.quantize(model, {"rules": [{"match": "*.out_proj", **specs}]}).plan

    assert plan.modules == ("a.out_proj",)
    torch.testing.assert_close(model["a"](x, x, x)[0], by_hand(model["a"], [x] * 3, {"out_proj"}))


def test_a_recipe_for_linear_layers_means_all_projections(toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H)})
    plan = toolkit.plan(model, "int8")
    assert {f"{entry.module}.{entry.slot}" for entry in plan.entries} == {
        *(f"a.{slot}" for slot in ("in_proj", "query", "key", "value")),
        *(f"a.out_proj.{slot}" for slot in ("weight", "input")),
    }


def test_a_weight_that_keeps_its_name_keeps_its_key(toolkit: Toolkit) -> None:
    model = nn.MultiheadAttention(E, H)
    keys = list(model.state_dict())
    toolkit.quantize(model, "int8-weight-only")
    assert list(model.state_dict()) == keys


def test_gradients_reach_every_parameter(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, add_bias_kv=True)})
    x = torch.randn(L, N, E)
    toolkit.quantize(model, recipe("a", "in_proj", *EVERY))
    model["a"](x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("need_weights", [True, False])
def test_it_compiles_without_a_break(need_weights: bool, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H)}).eval()
    x = torch.randn(L, N, E)
    toolkit.quantize(model, recipe("a", "in_proj", "query", "k", "p"))
    torch._dynamo.reset()
    compiled = torch.compile(model["a"], backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model["a"](x, x, x, need_weights=need_weights)[0]
        torch.testing.assert_close(compiled(x, x, x, need_weights=need_weights)[0], expected)


# --- fused layers ---------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options).eval()


def slow(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What an encoder computes layer by layer: with gradients there is no fused kernel."""
    with torch.enable_grad():
        return model(*args, **kwargs).detach()


PARTS = ["*.self_attn", "*.out_proj", "*.linear1", "layers.1.linear2"]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"norm_first": True}])
@pytest.mark.parametrize("part", PARTS)
def test_an_encoder_in_evaluation_uses_the_quantizers_of_its_layers(
    part: str, options: dict[str, Any], toolkit: Toolkit, same_bits: SameBits
) -> None:
    model = encoder(**options)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 3:] = True
    asks = ({}, {"src_key_padding_mask": padding})
    before = [model(x, **ask) for ask in asks]
    toolkit.quantize(model, {"rules": [{"match": part, "weight": "int4"}]})

    for ask, exact in zip(asks, before, strict=True):
        found, kept = model(x, **ask), ~padding if ask else ...
        torch.testing.assert_close(found[kept], slow(model, x, **ask)[kept])
        assert float((found - exact)[kept].abs().max()) > 1e-3
        with quantizers_off(model):  # the fused kernel again
            assert same_bits(model(x, **ask), exact)
    revert(model)
    assert not any(isinstance(module, QuantModule) for module in model.modules())
    assert same_bits(model(x), before[0])


@torch.no_grad()
def test_a_converted_encoder_compiles_without_a_break(toolkit: Toolkit) -> None:
    model, x = encoder(), torch.randn(N, L, E)
    toolkit.quantize(model, {"rules": [{"match": "layers.1.linear1", "weight": "int4"}]})
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_an_encoder_that_holds_nothing_quantized_keeps_its_class(toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(E, 2)})
    toolkit.quantize(model, {"rules": [{"match": "head", "weight": "int8"}]})
    assert type(model["encoder"]) is nn.TransformerEncoder
    assert type(model["encoder"].layers[0]) is nn.TransformerEncoderLayer


def test_a_restored_encoder_uses_its_quantizers_too(
    toolkit: Toolkit, tmp_path: Any, same_bits: SameBits
) -> None:
    model, x = encoder(), torch.randn(N, L, E)
    toolkit.quantize(model, {"rules": [{"match": "*.linear1", "weight": "int4"}]})
    toolkit.save(model, tmp_path / "state")
    fresh = encoder()
    toolkit.restore(fresh, tmp_path / "state")
    with torch.no_grad():
        assert same_bits(fresh(x), model(x))
        torch.testing.assert_close(fresh(x), slow(fresh, x))


class OwnAttention(nn.MultiheadAttention):
    """An attention that may do anything with its output projection."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_projection_whose_attention_may_not_call_it_is_refused(toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"own": OwnAttention(E, H), "torchs": nn.MultiheadAttention(E, H)})
    plan = toolkit.plan(model, "int8")
    assert "own.out_proj" not in plan.modules
    assert "torchs.out_proj" in plan.modules
    assert "may read the weight without calling the layer" in plan.skipped["own.out_proj"]
