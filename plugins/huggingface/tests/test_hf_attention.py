"""Attention and KV cache of transformers models, against attention written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import bittern
from bittern.errors import PlanError
from bittern.nn import named_quantizers, original_class, quantizers_off
from transformers_zoo import ZOO

ENTRIES = {entry.name: entry for entry in ZOO}
ALL = {"q": "fp8", "k": "fp8", "v": "fp8", "p": "fp8"}
CACHE = {"kv_cache": "fp8"}
# sdpa and eager, GQA, sinks, latents, alibi, classes of their own, cross attention, encoders
MODELS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("gpt_oss", "eager"),
    ("deepseek_v3", "sdpa"),
    ("falcon", "sdpa"),
    ("falcon_new", "eager"),
    ("gpt2", "sdpa"),
    ("t5", "sdpa"),
    ("whisper", "eager"),
    ("bert", "sdpa"),
    ("vit", "sdpa"),
    ("codegen", "eager"),  # its softmax is a module
]


def codegen() -> tuple[Any, dict[str, Any]]:
    config = transformers.CodeGenConfig(
        vocab_size=32, n_embd=32, n_layer=1, n_head=4, n_positions=16, rotary_dim=4
    )
    inputs = {"input_ids": torch.arange(12).view(1, -1), "use_cache": False}
    return transformers.CodeGenForCausalLM(config).eval(), inputs


def tiny(name: str, implementation: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    if name == "codegen":
        return codegen()
    made = ENTRIES[name].make()
    model: Any = made.model.float().eval()
    model.set_attn_implementation(implementation)
    inputs = dict(made.inputs)
    floats = {k: v.float() for k, v in inputs.items() if getattr(v, "is_floating_point", bool)()}
    return model, {**inputs, **floats}


def attention_paths(model: Any) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in named_quantizers(model)}


@pytest.mark.parametrize(("name", "implementation"), MODELS)
@torch.no_grad()
def test_every_attention_of_a_family_shows_its_operands(name: str, implementation: str) -> None:
    model, inputs = tiny(name, implementation)
    before = model(**inputs)[0]
    recipe = {"rules": [{"match": {"class": "Attention"}, "slots": ALL}]}
    bittern.quantize(model, recipe, [inputs])
    quantizers = dict(named_quantizers(model))
    assert all(quantizer.calibrated for quantizer in quantizers.values())
    assert len(quantizers) == 4 * len(attention_paths(model))
    after = model(**inputs)[0]
    assert 1e-4 < (after - before).norm() / before.norm() < 0.2
    with quantizers_off(model):
        assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("slot", ["q", "k", "v", "p"])
@torch.no_grad()
def test_eager_and_sdpa_quantize_alike(slot: str) -> None:
    outputs = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        model, inputs = tiny("llama", implementation)
        recipe = {"rules": [{"match": {"class": "LlamaAttention"}, "slots": {slot: "fp8"}}]}
        bittern.quantize(model, recipe, [inputs])
        outputs.append(model(**inputs)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


# --- one attention, written out ---


def fp8(x: Tensor, amax: Tensor) -> Tensor:
    scale = amax / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def test_llama_attention_is_attention_over_fp8_operands_after_rope() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attention": LlamaAttention(config, 0)}).eval()
    x = torch.randn(2, 6, 32)
    angles = torch.arange(6.0)[:, None] / 10 ** torch.arange(4.0)
    angles = torch.cat([angles, angles], -1)[None]
    rope = (angles.cos(), angles.sin())

    def run(model: Any) -> Tensor:
        found: Tensor = model["attention"](x, rope, None)[0]
        return found

    recipe = {"rules": [{"match": {"class": "LlamaAttention"}, "slots": ALL}]}
    bittern.quantize(model, recipe, run)
    layer: Any = model["attention"]
    heads = [p(x).view(2, 6, -1, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj)]
    q, k = apply_rotary_pos_emb(heads[0], heads[1], *rope)
    v = layer.v_proj(x).view(2, 6, -1, 8).transpose(1, 2)
    mask = torch.full((6, 6), -math.inf).triu(1)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8) + mask).softmax(-1)

    plain = scores(q, k)
    q, k, v = (fp8(t, t.abs().max()) for t in (q, k, v))
    p = fp8(scores(q, k), plain.abs().max())
    expected = layer.o_proj((p @ v.repeat_interleave(2, 1)).transpose(1, 2).reshape(2, 6, 32))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


# --- the cache ---


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon", "gpt2", "gemma3"])
@torch.no_grad()
def test_kv_cache_quantizes_keys_and_values_of_every_attention(name: str) -> None:
    model, inputs = tiny(name, "eager")
    bittern.quantize(model, CACHE, [inputs])
    names = {quantizer.rpartition(".")[2] for quantizer, _ in named_quantizers(model)}
    assert names == {"k", "v"}
    assert len(attention_paths(model)) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon", "gpt2"])
@torch.no_grad()
def test_generation_step_by_step_is_one_pass_over_the_same_tokens(name: str) -> None:
    """What a token left in the cache does not change when more tokens come."""
    model, inputs = tiny(name, "eager")
    bittern.quantize(model, CACHE, [inputs])
    prompt = inputs["input_ids"][:, :4]
    out = model.generate(
        prompt,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(input_ids=out.sequences, use_cache=False).logits[:, 3:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-4)
    with quantizers_off(model):
        original = model(input_ids=out.sequences, use_cache=False).logits[:, 3:-1]
    assert (whole - original).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "falcon", "llama", "mixtral"])
@torch.no_grad()
def test_attention_is_told_from_quantized_layers_inside_it(name: str) -> None:
    model, inputs = tiny(name, "eager")
    plan = bittern.quantize(model, {"extends": "int8", **CACHE}, [inputs]).plan
    caches = [e.module for e in plan.entries if e.slot == "k"]
    assert len(caches) == model.config.num_hidden_layers
    assert any(e.module.startswith(f"{caches[0]}.") and e.slot == "weight" for e in plan.entries)
    ranges = {name: q.amax for name, q in named_quantizers(model)}
    alone, _ = tiny(name, "eager")
    alone.load_state_dict(model.state_dict())
    bittern.quantize(alone, CACHE, [inputs])  # calibration sees what it saw beside int8 layers
    for path, quantizer in named_quantizers(alone):
        torch.testing.assert_close(ranges[path], quantizer.amax, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_attention_that_cannot_be_followed_is_an_error_with_its_name() -> None:
    model, inputs = tiny("deberta_v2", "eager")
    with pytest.raises(PlanError, match=r"attention\.self"):
        bittern.quantize(
            model, {"rules": [{"match": {"class": "Attention"}, "slots": ALL}]}, [inputs]
        )


def test_a_whole_model_is_no_attention() -> None:
    model, _ = tiny("bert")
    plan = bittern.plan(model, CACHE)
    assert {e.module.rpartition(".")[2] for e in plan.entries} == {"self"}


def test_recipes_for_linear_layers_leave_attention_alone() -> None:
    model, _ = tiny("llama")
    plan = bittern.plan(model, {"rules": [{"match": "*", "weight": "int8", "output": "int8"}]})
    assert not {e.slot for e in plan.entries if e.module.endswith("self_attn")}


@torch.no_grad()
def test_falcons_own_linear_layers_are_quantized() -> None:
    model, inputs = tiny("falcon")
    before = model(**inputs)[0]
    plan = bittern.quantize(model, "int8", [inputs]).plan
    kinds = {original_class(model.get_submodule(e.module)).__name__ for e in plan.entries}
    assert kinds == {"FalconLinear"}
    after = model(**inputs)[0]
    assert 1e-4 < (after - before).norm() / before.norm() < 0.1
    with quantizers_off(model):
        assert torch.equal(model(**inputs)[0], before)
