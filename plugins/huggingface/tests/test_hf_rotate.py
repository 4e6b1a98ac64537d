"""Rotations of real architectures: logits stay, gains go into weights, or the stream is left."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bittern as bt
from bittern.errors import CalibrationError
from bittern.nn import quantizers_off
from bittern.records import LoadConfig
from tracing_zoo import Entry
from transformers_zoo import ZOO

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
RECIPE = {"extends": "mxfp4", "algorithm": ["rotate", "max"]}
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def made(name: str, **options: object) -> nn.Module:
    """Return a tiny model whose norms have gains, and biases, of their own."""
    torch.manual_seed(0)
    model: nn.Module = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **options})),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**SIZES, **options})),
        "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
        "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **EXPERTS)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**{**GPT2, **options})),
    }[name]()
    for path, module in model.named_modules():
        if "norm" in path or "ln_" in path:
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(0.5, 2)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    with quantizers_off(model):
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
        return found


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_stay_and_all_weights_of_the_stream_change(name: str, attention: str) -> None:
    model = made(name)
    model.set_attn_implementation(attention)  # type: ignore[operator]
    expected, before = logits(model), copies(model)
    bt.quantize(model, RECIPE, [{"input_ids": IDS}])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    # Norms of single heads stay, and biases that are zeros.
    assert {n for n in same if not n.endswith(".bias")} == {
        n for n in before if "q_norm" in n or "k_norm" in n
    }
    for path, value in model.named_parameters():
        if path.endswith(("layernorm.weight", "model.norm.weight", "ln_1.weight", "ln_f.weight")):
            assert bool((value == 1).all()), path


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tie_is_kept_where_the_last_norm_has_no_gain_of_its_own(name: str) -> None:
    model = made(name, tie_word_embeddings=True)
    head, words = model.lm_head, model.get_input_embeddings()  # type: ignore[operator]
    last = model.transformer.ln_f if name == "gpt2" else model.model.norm  # type: ignore[union-attr]
    nn.init.constant_(last.weight, 1.5)
    expected, before = logits(model), copies(model)
    bt.quantize(model, RECIPE, [{"input_ids": IDS}])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert head.weight is words.weight
    assert not torch.equal(words.weight, before[next(iter(before))])


def test_a_tie_behind_a_gain_leaves_the_stream_and_not_the_heads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = made("llama", tie_word_embeddings=True)
    before = copies(model)
    with caplog.at_level(logging.INFO, "bittern.calibration"):
        bt.quantize(model, RECIPE, [{"input_ids": IDS}])
    changed = {
        n.split(".")[-2] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == {"v_proj", "o_proj"}
    assert "model.norm.weight cannot move into model.embed_tokens.weight" in caplog.text


ROTATED = frozenset(["llama", "qwen2", "qwen3", "phi3", "cohere", "starcoder2", "nemotron", "opt"])
ROTATED |= {"qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4", "granite_moe", "qwen3_next"}
ROTATED |= {"vit"}
# A norm behind each layer, or before a tied head; factors per channel.
LEFT = frozenset(
    ["llama_tied", "gemma3", "falcon", "gpt2", "bloom", "olmo2", "glm4", "bert", "t5", "dinov2"]
)


@pytest.mark.parametrize(
    "entry", [e for e in ZOO if e.name in ROTATED | LEFT], ids=lambda entry: entry.name
)
def test_the_function_stays_whatever_the_architecture(
    entry: Entry, caplog: pytest.LogCaptureFixture
) -> None:
    example = entry.make()
    model = example.model.float()
    inputs = {
        k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in example.inputs.items()
    }

    def outputs() -> list[Tensor]:
        with quantizers_off(model), torch.no_grad():
            found = tree_leaves(model(**inputs))
        return [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]

    expected, before = outputs(), copies(model)
    recipe = {"extends": "int8", "algorithm": ["rotate", "max"]}
    with caplog.at_level(logging.INFO, "bittern.calibration"):
        bt.quantize(model, recipe, [inputs])
    assert "all is put back" not in caplog.text
    for value, wanted in zip(outputs(), expected, strict=True):
        assert float((value - wanted).norm() / wanted.norm()) < 1e-3
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("norm" in n or "ln_" in n for n in changed) == (entry.name in ROTATED)


def test_heads_of_a_model_on_the_disk_are_rotated_as_in_memory(tmp_path: Path) -> None:
    """Its residual stream cannot be: it goes through all blocks."""
    made("llama", hidden_size=512, head_dim=128).save_pretrained(tmp_path / "m")
    plain, disk = (bt.load(tmp_path / "m", config=LoadConfig(device=d)) for d in ("cpu", "disk"))
    assert disk.get_parameter("model.layers.0.self_attn.v_proj.weight").is_meta
    batches = [{"input_ids": IDS}]
    for name in ("int8", "mxfp4"):
        whole = {**RECIPE, "extends": name}
        with pytest.raises(CalibrationError, match="goes through all blocks"):
            bt.quantize(disk, whole, batches, work_dir=tmp_path / f"refused-{name}")
    recipe = {"extends": "int8", "algorithm": [{"rotate": {"residual": False}}, "max"]}
    bt.quantize(plain, recipe, batches, layerwise=True)
    bt.quantize(disk, recipe, batches, work_dir=tmp_path / "work")
    values = [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, disk(input_ids=IDS).logits)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as before:
        assert not any(torch.equal(before.get_tensor(n), plain.get_parameter(n)) for n in values)
