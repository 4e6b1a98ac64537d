"""Fused experts: found by what they are, quantized per expert, as a plain loop does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import bittern
from bittern.nn import named_quantizers, quantizers_off
from transformers_zoo import ZOO

HIDDEN, INNER, COUNT, TOKENS = 16, 12, 4, 40
ENTRIES = {entry.name: entry for entry in ZOO}
INT8 = {"rules": [{"match": "experts", "weight": "int8", "input": "int8"}]}


class Layer(nn.Module):
    """A model that is nothing but experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = self.experts(tokens, index, weights)
        return found


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def mixtral(implementation: str = "grouped_mm") -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT
    )
    config._experts_implementation = implementation
    return filled(MixtralExperts(config))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT
    )
    config._experts_implementation = "grouped_mm"
    return filled(GptOssExperts(config))


def nemotron() -> nn.Module:
    config = transformers.NemotronHConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        n_routed_experts=COUNT,
        moe_latent_size=None,
    )
    config._experts_implementation = "batched_mm"
    return filled(NemotronHExperts(config))


def routed(seed: int, *, reached: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights, index = torch.rand(TOKENS, reached, generator=generator).topk(2, dim=-1)
    return tokens, index, weights


def quantized(experts: nn.Module, recipe: Any = INT8, *, reached: int = COUNT) -> Layer:
    layer = Layer(experts).eval()
    bittern.quantize(layer, recipe, lambda model: model(*routed(1, reached=reached)))
    return layer


# --- a plain reference ---


def int8(x: Tensor, amax: Tensor) -> Tensor:
    scale = amax / 127
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


def gate_of(experts: Any, both: Tensor) -> Tensor:
    if isinstance(experts, NemotronHExperts):
        return experts.act_fn(both)
    if isinstance(experts, GptOssExperts):
        gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = both[:, :INNER], both[:, INNER:]
    return nn.functional.silu(gate) * up


def matrices(experts: Any, index: int) -> tuple[Tensor, Tensor, Any, Any]:
    """Return both weights of an expert as (out, in), and its biases."""
    up = getattr(experts, "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj")[index]
    down = experts.down_proj[index]
    if isinstance(experts, GptOssExperts):
        return up.T, down.T, experts.gate_up_proj_bias[index], experts.down_proj_bias[index]
    return up, down, 0.0, 0.0


def expected(experts: Any, data: tuple[Tensor, ...], seen: tuple[Tensor, ...]) -> Tensor:
    """Quantize every expert by itself, with ranges from the tokens it saw."""
    tokens, index, weights = data
    result = torch.zeros_like(tokens)
    for expert in range(COUNT):
        up, down, up_bias, down_bias = matrices(experts, expert)
        first = seen[0][(seen[1] == expert).any(-1)]
        second = gate_of(experts, first @ up.T + up_bias)
        places = (index == expert).nonzero()
        x = int8(tokens[places[:, 0]], first.abs().max())
        up = int8(up, up.abs().amax(1, keepdim=True))
        x = gate_of(experts, x @ up.T + up_bias)
        x = int8(x, second.abs().max())
        down = int8(down, down.abs().amax(1, keepdim=True))
        x = (x @ down.T + down_bias) * weights[places[:, 0], places[:, 1], None]
        result.index_add_(0, places[:, 0], x)
    return result


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron])
@torch.no_grad()
def test_experts_compute_what_a_loop_over_quantized_experts_does(make: Any) -> None:
    layer = quantized(make())
    data = routed(2)
    torch.testing.assert_close(
        layer(*data), expected(layer.experts, data, routed(1)), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_every_expert_of_llama4_has_its_own_range() -> None:
    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT
    )
    model = nn.ModuleDict({"experts": filled(Llama4TextExperts(config))})
    sizes = torch.tensor([1.0, 2.0, 4.0, 8.0])
    rows = torch.randn(COUNT, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    rows = (rows * sizes[:, None, None]).flatten(0, 1)
    bittern.quantize(model, INT8, lambda model: model["experts"](rows))
    experts: Any = model["experts"]
    amax = experts.quantizer("gate_up_input").amax
    assert torch.equal(amax, rows.view(COUNT, -1).abs().amax(1))
    up, down = experts.gate_up_proj, experts.down_proj
    parts = []
    for expert, x in enumerate(rows.view(COUNT, 5, HIDDEN)):
        w_up = int8(up[expert], up[expert].abs().amax(0, keepdim=True))
        w_down = int8(down[expert], down[expert].abs().amax(0, keepdim=True))
        plain = gate_of(experts, x @ up[expert])
        inner = gate_of(experts, int8(x, amax[expert]) @ w_up)
        parts.append(int8(inner, plain.abs().max()) @ w_down)
    torch.testing.assert_close(experts(rows), torch.cat(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@torch.no_grad()
def test_without_quantizers_the_selected_implementation_runs(implementation: str) -> None:
    data = routed(2)
    before = Layer(mixtral(implementation))(*data)
    layer = quantized(mixtral(implementation))
    assert not torch.equal(layer(*data), before)
    with quantizers_off(layer):
        assert torch.equal(layer(*data), before)


@torch.no_grad()
def test_every_implementation_quantizes_alike() -> None:
    data = routed(2)
    one, *others = [quantized(mixtral(n))(*data) for n in ("grouped_mm", "batched_mm", "eager")]
    for other in others:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_arguments_may_be_given_by_the_names_of_the_original() -> None:
    layer = quantized(gpt_oss())
    tokens, index, weights = routed(2)
    by_name = layer.experts(tokens, routing_weights=weights, router_indices=index)
    assert torch.equal(by_name, layer(tokens, index, weights))


@torch.no_grad()
def test_an_expert_that_saw_no_token_still_computes() -> None:
    layer = quantized(mixtral(), reached=COUNT - 1)
    amax = dict(named_quantizers(layer))["experts.gate_up_input"].amax
    assert amax is not None
    assert amax[-1] > 0
    with torch.no_grad():
        assert layer(*routed(2)).isfinite().all()
        assert layer(*(part[:0] for part in routed(2))).shape == (0, HIDDEN)


def test_rows_for_experts_of_other_processes_count_for_nothing() -> None:
    layer = quantized(mixtral())
    tokens, index, weights = routed(2)
    layer.experts._is_expert_parallel = True  # what transformers sets under expert parallelism
    elsewhere = index == 0
    found = layer(tokens, index.masked_fill(elsewhere, COUNT), weights.masked_fill(elsewhere, 0))
    here = layer(tokens, index, weights.masked_fill(elsewhere, 0))
    torch.testing.assert_close(found, here, rtol=1e-5, atol=1e-6)


def test_gradients_reach_weights_and_tokens() -> None:
    layer = quantized(gpt_oss())
    tokens, index, weights = routed(2)
    tokens.requires_grad_()
    layer(tokens, index, weights).square().sum().backward()
    for name, tensor in [("tokens", tokens), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4"])
def test_shipped_recipes_quantize_experts_and_leave_routers(name: str) -> None:
    made = ENTRIES[name].make()
    plan = bittern.plan(made.model, "int8")
    experts = {e.module for e in plan.entries if e.module.endswith(".experts")}
    assert experts
    for path in experts:
        slots = {e.slot for e in plan.entries if e.module == path}
        assert slots == {"gate_up_proj", "down_proj", "gate_up_input", "down_input"}
    assert not plan.warnings  # nor is anybody told of biases
    assert not any("router" in e.module or e.module.endswith(".gate") for e in plan.entries)


@pytest.mark.parametrize(
    ("make", "shape"), [(mixtral, (COUNT, 2 * INNER, 1)), (gpt_oss, (COUNT, 1, 2 * INNER))]
)
def test_weights_have_scales_per_expert_and_channel_however_they_lie(make: Any, shape: Any) -> None:
    experts: Any = quantized(make()).experts
    assert tuple(experts.quantizer("gate_up_proj").scale.shape) == shape


def test_groups_run_along_the_input_features() -> None:
    recipe = {"rules": [{"match": "experts", "weight": {"format": "int4", "size": 4}}]}
    experts: Any = quantized(gpt_oss(), recipe).experts
    assert tuple(experts.quantizer("down_proj").scale.shape) == (COUNT, INNER // 4, HIDDEN)


def test_a_quantized_model_is_traced_like_the_original() -> None:
    made = ENTRIES["mixtral"].make()
    model = made.model.float()
    before = bittern.trace(model, made.inputs)
    bittern.quantize(model, "int8", [dict(made.inputs)])
    after = bittern.trace(model, made.inputs)
    assert after.shared_inputs == before.shared_inputs
    assert [(g.size, len(g.members)) for g in after.groups] == [
        (g.size, len(g.members)) for g in before.groups
    ]
    assert after.coverage.fraction == before.coverage.fraction
