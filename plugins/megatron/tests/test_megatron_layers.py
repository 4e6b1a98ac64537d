"""What quantized parallel layers compute, refuse and leave alone, on one rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megatron_models
from bittern.errors import ModelError
from bittern.nn import QuantModule
from bittern.testing import sqnr
from bittern.toolkit import Toolkit
from bittern_megatron.parallel import SharedQuantizer
from megatron_models import batch, column, gpt, row

RULE = {"match": {"class": "Linear"}, "weight": "int8", "input": "fp8"}
RECIPE = {"extends": "base", "rules": [RULE]}
X = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Megatron's groups, in a process group of one."""
    megatron_models.ensure_groups()
    with megatron_models.on_cpu():
        yield
    megatron_models.leave_groups()


@pytest.fixture
def toolkit() -> Toolkit:
    return Toolkit(plugins=["megatron"])


def quantized(layer: nn.Module, toolkit: Toolkit, recipe: Any = None) -> QuantModule:
    toolkit.quantize(nn.Sequential(layer), recipe or RECIPE, [X])
    assert isinstance(layer, QuantModule)
    return layer


def reference(layer: QuantModule, x: Tensor, weight: Tensor) -> Tensor:
    """Return the product of int8 weights per channel and fp8 inputs per tensor, by hand."""
    input_quantizer = layer.quantizer("input")
    assert input_quantizer is not None
    assert input_quantizer.amax is not None
    scale = input_quantizer.amax / 448
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = torch.round(weight / steps).clamp(-128, 127) * steps
    return F.linear(codes * scale, rounded)


@pytest.mark.parametrize("make", [column, row])
@torch.no_grad()
def test_the_product_is_that_of_quantized_operands(make: Any, toolkit: Toolkit) -> None:
    layer = make()
    nn.init.normal_(layer.bias)
    quantized(layer, toolkit)
    output, bias = layer(X)
    assert bias is None
    torch.testing.assert_close(output, reference(layer, X, layer.weight) + layer.bias)


@pytest.mark.parametrize("make", [column, row])
def test_a_bias_that_the_caller_adds_is_returned(make: Any, toolkit: Toolkit) -> None:
    layer = make(skip_bias_add=True)
    quantized(layer, toolkit)
    output, bias = layer(X)
    assert bias is layer.bias
    torch.testing.assert_close(output, reference(layer, X, layer.weight))


def test_its_own_weight_may_be_given_and_no_other(toolkit: Toolkit) -> None:
    layer = column()
    quantized(layer, toolkit)
    expected, _ = layer(X)
    assert torch.equal(layer(X, weight=layer.weight)[0], expected)
    with pytest.raises(ModelError, match="0: it is called with a weight that is not its own"):
        layer(X, weight=torch.zeros(96, 64))


def test_the_fused_accumulation_of_gradients_is_off(toolkit: Toolkit) -> None:
    layer = column()
    quantized(layer, toolkit)
    layer.gradient_accumulation_fusion = True  # its kernel is not here, and would write elsewhere
    layer(X)[0].sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


def test_a_layer_without_a_weight_is_left_alone(toolkit: Toolkit) -> None:
    model = nn.Sequential(column(skip_weight_param_allocation=True), column())
    named = {**RULE, "match": {"class": "ColumnParallelLinear"}}
    plan = toolkit.plan(model, {**RECIPE, "rules": [named]})
    assert plan.modules == ("1",)
    assert "no weight of its own" in plan.skipped["0"]


def test_a_gpt_is_quantized_where_it_multiplies(toolkit: Toolkit) -> None:
    plan = toolkit.plan(gpt(), "int8")
    layers = ("self_attention.linear_proj", "self_attention.linear_qkv")
    layers += ("mlp.linear_fc1", "mlp.linear_fc2")
    assert set(plan.modules) == {f"decoder.layers.{i}.{name}" for i in (0, 1) for name in layers}
    assert "role head" in plan.skipped["output_layer"]
    assert "looked up" in plan.skipped["embedding.word_embeddings"]


def test_the_adapter_describes_a_gpt(toolkit: Toolkit) -> None:
    model = gpt()
    adapter = toolkit.adapter(model)
    assert adapter.blocks == ("decoder.layers.0", "decoder.layers.1")
    assert adapter.roles["output_layer"] == "head"
    assert adapter.roles["embedding.word_embeddings"] == "embedding"
    assert adapter.roles["decoder.final_layernorm"] == "norm"
    assert adapter.example_inputs is not None
    assert adapter.logits is not None
    logits = adapter.logits(model(**adapter.example_inputs()))
    assert logits.shape == (1, 16, adapter.vocab_size)


def test_routers_are_named(toolkit: Toolkit) -> None:
    model = gpt(num_moe_experts=2, moe_router_topk=2)
    assert toolkit.adapter(model).roles["decoder.layers.0.mlp.router"] == "router"


@torch.no_grad()
def test_experts_are_quantized_one_by_one(toolkit: Toolkit) -> None:
    plan = toolkit.plan(gpt(num_moe_experts=2, moe_router_topk=2), "int8")
    assert "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2" in plan.modules


@torch.no_grad()
def test_calibration_after_a_trace_has_memory(toolkit: Toolkit) -> None:
    model = gpt()
    memory = megatron_models.parallel_state.get_global_memory_buffer().buffer
    memory.clear()
    recipe = {"extends": "int8", "algorithm": ["smooth", "max"]}  # traces, then runs the data
    toolkit.quantize(model, recipe, [batch(0)])
    toolkit.trace(model)
    evaluation = toolkit.evaluate(model, [batch(0)])
    assert evaluation.perplexity is not None
    assert all(type(buffer) is Tensor for buffer in memory.values())


@torch.no_grad()
def test_tracing_and_evaluating_leave_a_gpt_usable(toolkit: Toolkit) -> None:
    model = gpt()
    toolkit.trace(model)
    plain = model(**batch(0))
    toolkit.quantize(model, "int8", [batch(0)])
    assert sqnr(plain, model(**batch(0))) > 20
    data = [batch(1)]
    evaluation = toolkit.evaluate(model, data)
    logits = model(**data[0])[:, :-1].reshape(-1, megatron_models.VOCABULARY)
    expected = F.cross_entropy(logits, data[0]["input_ids"][:, 1:].reshape(-1)).exp()
    assert evaluation.perplexity == pytest.approx(float(expected), rel=1e-4)


def test_models_of_others_are_not_described(toolkit: Toolkit) -> None:
    from bittern_megatron.adapter import make_adapter
    from bittern_megatron.checkpoint import make_io

    model = nn.Sequential(nn.Linear(4, 4))
    assert make_adapter(model) is None
    assert make_io(model, Path("x")) is None


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("trained", [True, False], ids=["into its own", "into a fresh layer"])
def test_a_learned_range_goes_through_a_sharded_state_dict(
    granularity: str, trained: bool, toolkit: Toolkit
) -> None:
    weight = {"format": "int8", "granularity": granularity}
    recipe = {"extends": "base", "rules": [{"match": {"class": "Linear"}, "weight": weight}]}
    layer = quantized(column(), toolkit, recipe)
    learned = layer.quantizer("weight").learn()
    with torch.no_grad():
        learned.mul_(0.5)
    entries = layer.sharded_state_dict(metadata={"dp_cp_group": None})
    assert entries["weight_quantizer.amax"].data is learned  # optimizers find their parameter
    state = {key: e.data.detach().clone() for key, e in entries.items() if "_extra" not in key}
    expected, _ = layer(X)

    other = layer
    if trained:
        with torch.no_grad():
            learned.fill_(1)
    else:
        other = column()
        toolkit.convert(nn.Sequential(other), toolkit.plan(nn.Sequential(other), recipe))
    other.load_state_dict(state)
    assert torch.equal(other(X)[0], expected)
    if trained:
        assert other.quantizer("weight").learned is learned


def test_a_learned_range_is_fixed_where_ranks_share_it(toolkit: Toolkit) -> None:
    layer = quantized(column(), toolkit)
    learned = layer.quantizer("input")
    learned.learn()
    shared = SharedQuantizer(learned.spec, name="shared")
    shared.load_state(learned.state())
    assert shared.learned is None
    assert torch.equal(shared(X), learned(X))


def test_hooks_import_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, bittern_megatron.hooks as hooks\n"
        "hooks.register_modules()\n"
        "print('torch' in sys.modules, 'megatron' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
