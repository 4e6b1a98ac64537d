from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import bittern as bt
from bittern.errors import PlanError
from bittern.toolkit import default_toolkit
from bittern_huggingface.adapter import make_adapter

DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            **DECODER, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=96)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    ),
}


def adapter_of(name: str) -> Any:
    torch.manual_seed(0)
    return make_adapter(MODELS[name]().eval())


@pytest.mark.parametrize(
    ("name", "causal"),
    [("llama", True), ("qwen3_moe", True), ("gpt2", True), ("bert", False), ("t5", False)],
)
def test_only_decoders_predict_the_next_token(name: str, causal: bool) -> None:
    assert adapter_of(name).causal is causal


@pytest.mark.parametrize(
    ("name", "head"),
    [("llama", "lm_head"), ("gpt2", "lm_head"), ("bert", "cls.predictions.decoder")],
)
def test_the_head_is_found_by_identity(name: str, head: str) -> None:
    assert adapter_of(name).roles[head] == "head"


def test_routers_are_found_by_what_they_are() -> None:
    routers = [path for path, role in adapter_of("qwen3_moe").roles.items() if role == "router"]
    assert routers == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("SwitchTransformers", "encoder.block.1.layer.1.mlp.router.classifier"),
        ("JetMoe", "layers.0.mlp.router.layer"),
        ("HunYuanMoEV1", "layers.0.mlp.gate.wg"),
    ],
)
def test_the_layers_inside_of_a_router_are_routers(name: str, router: str) -> None:
    config = getattr(tf, f"{name}Config")(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=32,
        num_hidden_layers=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
    )
    with torch.device("meta"):
        model = getattr(tf, f"{name}Model")(config)
    adapter = make_adapter(model)
    assert adapter is not None
    assert isinstance(model.get_submodule(router), nn.Linear)
    assert adapter.roles[router] == "router"


def test_a_plain_linear_beside_experts_is_a_router_too() -> None:
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 4)
            self.up = nn.Linear(64, 64)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    model = MODELS["llama"]()
    model.model.layers[0].mlp = Moe()
    adapter = make_adapter(model)
    assert adapter is not None
    assert adapter.roles["model.layers.0.mlp.gate"] == "router"
    assert "model.layers.0.mlp.up" not in adapter.roles


@pytest.mark.parametrize(
    ("name", "first"),
    [("llama", "model.layers.0"), ("gpt2", "transformer.h.0"), ("bert", "bert.encoder.layer.0")],
)
def test_the_repeated_blocks_are_found(name: str, first: str) -> None:
    blocks = adapter_of(name).blocks
    assert len(blocks) == 2
    assert blocks[0] == first


@pytest.mark.parametrize("name", list(MODELS))
def test_the_example_inputs_run_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    adapter = make_adapter(model)
    assert adapter is not None
    assert adapter.example_inputs is not None
    with torch.no_grad():
        model(**adapter.example_inputs(), **adapter.call_kwargs)


def test_another_frameworks_model_has_no_adapter() -> None:
    assert make_adapter(nn.Linear(2, 2)) is None


def test_perplexity_of_a_masked_model_is_not_invented() -> None:
    torch.manual_seed(0)
    model = MODELS["bert"]().eval()
    data = [{"input_ids": torch.randint(0, 96, (2, 16))}]
    bt.quantize(model, "int8-weight-only")
    evaluation = bt.evaluate(model, data)
    assert evaluation.perplexity is None
    assert evaluation.output_sqnr_db is not None
    assert evaluation.output_sqnr_db > 20


def test_a_model_that_somebody_else_quantized_is_refused() -> None:
    model = MODELS["llama"]()
    config = tf.CompressedTensorsConfig(config_groups={})
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": config})()
    with pytest.raises(PlanError, match="compressed-tensors"):
        bt.plan(model, "int8")


def test_a_model_of_which_nothing_is_left_is_refused_not_passed_over() -> None:
    without = ["skip.+={class: Conv1D}"]  # GPT-2 is all Conv1D
    with pytest.raises(PlanError, match="quantizes nothing"):
        default_toolkit().plan(MODELS["gpt2"](), "int8", overrides=without)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_with_weights_is_planned_or_skipped_with_a_reason(name: str) -> None:
    model = MODELS[name]()
    plan = default_toolkit().plan(model, "int8")
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert (path in plan.modules) != (path in plan.skipped), path
            assert plan.skipped.get(path, "reason")


def test_quantizing_a_plain_model_does_not_import_transformers() -> None:
    code = """
import sys, torch, bittern as bt
bt.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), "int8-weight-only")
assert [r.status for r in bt.Toolkit().plugins.records if r.name == "huggingface"] == ["loaded"]
assert not {"transformers", "compressed_tensors", "triton"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
