"""Experts and KV caches in compressed-tensors: what the client loads, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import bittern as bt
from bittern.errors import ExportError
from bittern.toolkit import default_toolkit
from transformers_zoo import ZOO

ENTRIES = {entry.name: entry for entry in ZOO}
WEIGHTS_ONLY = 'rules.+={match: "*.experts", input: null}'
NO_EXPERTS = 'skip.+="*.experts"'
TENSORWISE = "rules.0.weight={format: int8, granularity: tensor}"


def quantized(name: str, recipe: str, *overrides: str) -> Any:
    made = ENTRIES[name].make()
    model = made.model.float().eval()
    bt.quantize(model, recipe, [dict(made.inputs)], overrides=list(overrides))
    return model


def refusal(name: str, recipe: str, *overrides: str) -> str:
    """Return what is said before anything was computed."""
    model = ENTRIES[name].make().model
    plan = bt.plan(model, recipe, overrides=list(overrides))
    with pytest.raises(ExportError) as caught:
        default_toolkit().check_export(model, plan, "compressed-tensors")
    return str(caught.value)


def shapes(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def config_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def test_the_client_loads_packed_experts_beside_int8_layers_and_an_fp8_cache(
    tmp_path: Path,
) -> None:
    model = quantized("mixtral", "int8", WEIGHTS_ONLY, "kv_cache=fp8")
    bt.export(model, tmp_path / "out", format="compressed-tensors")  # verified by the client
    found = shapes(tmp_path / "out")
    layer = "model.layers.0."
    inner, hidden = model.model.layers[0].mlp.experts.down_proj.shape[:0:-1]
    expert = f"{layer}block_sparse_moe.experts.1."  # the name that Mixtral has on disk
    names = {n.removeprefix(expert) for n in found if n.startswith(expert)}
    parts = ("weight_packed", "weight_scale", "weight_shape")
    assert names == {f"{w}.{part}" for w in ("w1", "w2", "w3") for part in parts}
    assert found[f"{expert}w1.weight_scale"] == (torch.float32, (inner, 1))
    assert found[f"{expert}w2.weight_scale"] == (torch.float32, (hidden, 1))
    assert found[f"{layer}self_attn.q_proj.weight"][0] == torch.int8
    assert found[f"{layer}self_attn.k_scale"] == (torch.float32, (1,))
    assert found[f"{layer}self_attn.v_scale"] == (torch.float32, (1,))
    config = config_of(tmp_path / "out")
    scheme = config["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
    targets = [t for group in config["config_groups"].values() for t in group["targets"]]
    (pattern,) = [t for t in targets if t.startswith("re:") and "layers.0" in t.replace("\\", "")]
    assert re.fullmatch(pattern[3:], f"{expert}w1")
    assert not re.fullmatch(pattern[3:], f"{layer}self_attn.q_proj")


def test_experts_of_llama4_are_written_as_the_linear_layers_they_become(tmp_path: Path) -> None:
    model = quantized("llama4", "int8")
    bt.export(model, tmp_path / "out", format="compressed-tensors", verify=False)
    found = shapes(tmp_path / "out")
    count, hidden, _ = model.model.layers[1].feed_forward.experts.gate_up_proj.shape
    for index in range(count):
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.1.feed_forward.experts.{index}.{name}"
            rows = found[f"{path}.weight"][1][0]
            assert found[f"{path}.weight"][0] == torch.int8
            assert found[f"{path}.weight_scale"] == (torch.float32, (rows, 1))
            assert found[f"{path}.input_scale"] == (torch.float32, (1,))
    assert found["model.layers.1.feed_forward.experts.0.gate_proj.weight"][1][1] == hidden


def test_experts_of_llama4_that_stay_are_written_one_by_one_and_ignored(tmp_path: Path) -> None:
    model = quantized("llama4", "int8", NO_EXPERTS)
    bt.export(model, tmp_path / "out", format="compressed-tensors", verify=False)
    path = "model.layers.1.feed_forward.experts"
    found = shapes(tmp_path / "out")
    assert f"{path}.0.up_proj.weight" in found
    assert f"{path}.gate_up_proj" not in found
    assert f"{path}.0.up_proj" in config_of(tmp_path / "out")["ignore"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "recipe", "overrides"),
    [
        ("mixtral", "int4", ("rules.0.weight.size=4",)),
        ("mixtral", "int8-weight-only", (TENSORWISE,)),
        ("mixtral", "fp8", (WEIGHTS_ONLY,)),
        ("qwen3_moe", "int8-weight-only", ()),
        ("deepseek_v3", "fp8", (WEIGHTS_ONLY,)),
        ("llama4", "int8", ()),
        ("llama4", "fp8", ("kv_cache=fp8",)),
        ("llama4", "int8", (NO_EXPERTS,)),
        ("gpt_oss", "int8", (NO_EXPERTS,)),
        ("granite_moe", "int8", (NO_EXPERTS,)),
        ("qwen3", "fp8", ("kv_cache=fp8",)),
        ("gemma3", "fp8", ("kv_cache=fp8",)),
    ],
)
def test_the_client_computes_what_the_model_in_memory_does(
    name: str, recipe: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    model = quantized(name, recipe, *overrides)
    bt.export(model, tmp_path / "out", format="compressed-tensors")


def test_quantized_inputs_of_experts_are_refused_with_overrides_that_work(tmp_path: Path) -> None:
    said = refusal("mixtral", "int8")
    offered = re.findall(r"-o '([^']*)'", said)
    assert offered == [WEIGHTS_ONLY, NO_EXPERTS]
    for override in offered:
        model = ENTRIES["mixtral"].make().model
        plan = bt.plan(model, "int8", overrides=[override])
        default_toolkit().check_export(model, plan, "compressed-tensors")
        assert any("self_attn" in path for path in plan.modules)


@pytest.mark.parametrize("name", ["gpt_oss", "granite_moe"])
def test_experts_stored_as_one_tensor_are_refused(name: str) -> None:
    assert NO_EXPERTS in refusal(name, "int8-weight-only")


def test_two_formats_of_experts_are_refused() -> None:
    one = 'rules.+={match: "model.layers.0.mlp.experts", weight: fp8}'
    said = refusal("mixtral", "int8-weight-only", one)
    assert "one scheme for all experts" in said
    other = 'rules.+={match: "*.experts", slots: {down_proj: fp8}}'
    assert "gate_up_proj and down_proj alike" in refusal("mixtral", "int8-weight-only", other)


@pytest.mark.parametrize(
    ("name", "override", "why"),
    [
        ("llama", "kv_cache=int8", "static fp8"),
        ("llama", "kv_cache={format: fp8, dynamic: true}", "static fp8"),
        (
            "llama",
            "rules.+={match: {class: Attention}, slots: {q: fp8, k: fp8, v: fp8}}",
            "about q",
        ),
        ("llama", 'rules.+={match: "*.0.self_attn", slots: {k: fp8, v: fp8}}', "every attention"),
        ("deepseek_v3", "kv_cache=fp8", "latents"),
        ("falcon", "kv_cache=fp8", "no cache that the client knows"),
        ("opt", "kv_cache=fp8", "Cannot determine num_key_value_heads"),
    ],
)
def test_other_attention_than_an_fp8_cache_is_refused(name: str, override: str, why: str) -> None:
    experts = (NO_EXPERTS,) if name == "deepseek_v3" else ()
    said = refusal(name, "fp8", override, *experts)
    assert why in said
    assert "safetensors" in said


def test_conv1d_is_refused_and_the_safetensors_export_takes_it(tmp_path: Path) -> None:
    said = refusal("gpt2", "int8")
    assert "Conv1D" in said
    assert "skip" not in said  # nothing would be left
    model = quantized("gpt2", "int8")
    data = [dict(ENTRIES["gpt2"].make().inputs)]
    bt.export(model, tmp_path / "out", format="safetensors", data=data)
    found = shapes(tmp_path / "out")
    weight = found["transformer.h.0.mlp.c_fc.weight"]
    assert weight[0] == torch.int8
    assert found["transformer.h.0.mlp.c_fc.weight_scale"] == (torch.float32, (1, weight[1][1]))
