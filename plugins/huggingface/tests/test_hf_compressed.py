"""The compressed-tensors checkpoint, judged by transformers + compressed-tensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bittern as bt
from bittern.errors import ExportError, OutputError, VerificationError
from bittern.exporting import ExportRecord
from bittern_huggingface.compressed.reload import _message, ask_client
from bittern_huggingface.compressed.verify import _scales

RECIPES = ["int8", "int8-weight-only", "int4", "fp8", "fp8-dynamic"]
# suffix -> (dtype, shape as a function of out and in), after the library's own presets
INT8: dict[str, Any] = {
    "weight": (torch.int8, lambda o, i: (o, i)),
    "weight_scale": (torch.float32, lambda o, i: (o, 1)),
    "input_scale": (torch.float32, lambda o, i: (1,)),
}
PACKED: dict[str, Any] = {
    "weight_packed": (torch.int32, lambda o, i: (o, i // 4)),
    "weight_scale": (torch.float32, lambda o, i: (o, 1)),
    "weight_shape": (torch.int64, lambda o, i: (2,)),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "int8": INT8,
    "int8-weight-only": PACKED,
    "int4": {
        **PACKED,
        "weight_packed": (torch.int32, lambda o, i: (o, i // 8)),
        "weight_scale": (torch.float32, lambda o, i: (o, i // 128)),
    },
    "fp8": {
        **INT8,
        "weight": (torch.float8_e4m3fn, lambda o, i: (o, i)),
        "weight_scale": (torch.float32, lambda o, i: (1,)),
    },
    "fp8-dynamic": {
        "weight": (torch.float8_e4m3fn, lambda o, i: (o, i)),
        "weight_scale": (torch.float32, lambda o, i: (o, 1)),
    },
}
FORMATS = {
    "int8": "int-quantized",
    "int8-weight-only": "pack-quantized",
    "int4": "pack-quantized",
    "fp8": "float-quantized",
    "fp8-dynamic": "float-quantized",
}


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export the tiny model once per recipe, without the client."""
    made: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in made:
            generator = torch.Generator().manual_seed(1)
            data = [{"input_ids": torch.randint(0, 2048, (2, 32), generator=generator)}]
            model = bt.load(str(tiny_dir))
            bt.quantize(model, recipe, data=data)
            made[recipe] = tmp_path_factory.mktemp("ct") / recipe
            bt.export(model, made[recipe], verify=False, data=data)
        return made[recipe]

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_names_dtypes_and_shapes_are_those_of_the_library(
    recipe: str, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint(recipe)
    tensors = load_file(path / "model.safetensors")
    found = {
        name.removeprefix("model.layers.0.mlp.down_proj."): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.mlp.down_proj.")
    }
    expected = {name: (dtype, shape(128, 256)) for name, (dtype, shape) in LAYOUTS[recipe].items()}
    assert found == expected
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert tensors[name].dtype == torch.bfloat16, "what stays keeps the checkpoint's dtype"
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == FORMATS[recipe]
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    assert list(config["config_groups"]) == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert (path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "recipe",
    [
        "int8",
        "int4",
        "fp8",
        pytest.param("int8-weight-only", marks=pytest.mark.heavy),
        pytest.param("fp8-dynamic", marks=pytest.mark.heavy),
    ],
)
def test_the_client_in_a_fresh_process_computes_what_the_model_in_memory_does(
    recipe: str, demo_dir: Path, tmp_path: Path
) -> None:
    """On a trained model: the client's losses on held-out text equal ours token for token."""
    from bittern.evaluation import token_nll
    from bittern.records import DataConfig
    from bittern.toolkit import default_toolkit

    model = bt.load(str(demo_dir))
    tools = default_toolkit()
    calibration = tools.data(demo_dir.parent / "calibration.txt", model, DataConfig(samples=16))
    rows = tools.data(demo_dir.parent / "heldout.txt", model, DataConfig(samples=8)).rows
    bt.quantize(model, recipe, data=calibration)
    with torch.no_grad():
        ours = token_nll(model(input_ids=rows, use_cache=False).logits, rows)
    bt.export(model, tmp_path / "out", verify=False, data=calibration)
    answer = ask_client(tmp_path / "out", rows.tolist())
    assert answer["missing"] == answer["unexpected"] == answer["mismatched"] == []
    assert answer["quantized"]
    theirs = torch.tensor(answer["nll"])
    assert torch.allclose(ours, theirs, atol=1e-3)
    assert abs(theirs.mean().exp() / ours.mean().exp() - 1) < 1e-4


def test_an_export_is_verified_by_itself(tiny_dir: Path, tmp_path: Path) -> None:
    model = bt.load(str(tiny_dir))
    bt.quantize(model, "int4")
    bt.export(model, tmp_path / "out")
    verdict = bt.verify(tmp_path / "out")
    assert verdict.ok
    assert verdict.client == "transformers"
    assert verdict.perplexity == pytest.approx(verdict.reference_perplexity, rel=1e-4)


def test_a_model_held_in_bfloat16_is_verified_in_float32(tiny_dir: Path, tmp_path: Path) -> None:
    model = bt.load(str(tiny_dir), config=bt.LoadConfig(dtype="bfloat16"))
    bt.quantize(model, "fp8-dynamic")
    bt.export(model, tmp_path / "out")
    verdict = bt.verify(tmp_path / "out")
    assert verdict.perplexity == pytest.approx(verdict.reference_perplexity, rel=1e-4)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_equal_models_give_equal_bytes(tiny_dir: Path, tmp_path: Path, batches: Any) -> None:
    for name in ("a", "b"):
        model = bt.load(str(tiny_dir))
        bt.quantize(model, "int8", data=batches)
        bt.export(model, tmp_path / name, verify=False)
    for file in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_mixed_schemes_name_their_modules(tiny_dir: Path, tmp_path: Path) -> None:
    model = bt.load(str(tiny_dir))
    recipe = {
        "extends": "int4",
        "rules": [{"match": "*.self_attn.*_proj", "weight": {"format": "int8"}, "input": "none"}],
    }
    bt.quantize(model, recipe)
    bt.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    assert len(groups) == 2
    assert {len(group["targets"]) for group in groups.values()} == {6, 8}
    assert config["format"] == "pack-quantized"


def test_modules_left_out_by_a_recipe_are_ignored_by_name(tiny_dir: Path, tmp_path: Path) -> None:
    model = bt.load(str(tiny_dir))
    recipe = {
        "extends": "fp8-dynamic",
        "rules": [{"match": "*.layers.1.mlp.*", "weight": "none", "input": "none"}],
    }
    bt.quantize(model, recipe)
    bt.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gone = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(config["ignore"]) == {"lm_head", *gone}


# --- what the client cannot load is refused before anything is computed ---


def test_a_partial_group_is_refused_with_a_size_that_works(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config)
    bt.quantize(model, "int4")
    with pytest.raises(ExportError, match="groups of 128") as caught:
        bt.export(model, tmp_path / "out")
    assert "size=32" in str(caught.value)
    assert not (tmp_path / "out").exists()
    bt.quantize(model, "int4", overrides=["rules.*.weight.size=32"])
    bt.export(model, tmp_path / "out")


def test_convolutions_are_refused_with_a_hint(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = transformers.ViTForImageClassification(config)
    bt.quantize(model, "int8-weight-only")
    with pytest.raises(ExportError, match="Conv2d") as caught:
        bt.export(model, tmp_path / "out", format="compressed-tensors")
    assert "skip.+={class: Conv2d}" in str(caught.value)
    bt.quantize(model, "int8-weight-only", overrides=["skip.+={class: Conv2d}"])
    bt.export(model, tmp_path / "out")


def test_a_pooling_attention_of_torch_is_left_out_in_two_steps(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = transformers.SiglipVisionModel(config)
    overrides = ["skip.+={class: Conv2d}", "skip.+={class: MultiheadAttention}"]
    bt.quantize(model, "int8-weight-only", overrides=overrides)
    with pytest.raises(ExportError, match="never calls it") as caught:
        bt.export(model, tmp_path / "out", format="compressed-tensors")
    (hint,) = re.findall(r"-o '(.*?)'", str(caught.value.hint))
    bt.quantize(model, "int8-weight-only", overrides=[*overrides, hint])
    bt.export(model, tmp_path / "out", format="compressed-tensors", verify=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("q_proj.weight_scale") for name in found)


def test_only_scales_of_quantizers_must_be_positive() -> None:
    zero = torch.zeros(2)
    named = {"a.weight_scale": zero, "a.correct_output_scale": zero, "k_scale": zero}
    found = {finding.tensor_or_field for finding in _scales(named)}
    assert found == {"a.weight_scale", "k_scale"}


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (
            'Traceback:\n  File "a", line 1\n    f()\nValueError: no {\n  "x": 1\n}\n',
            "ValueError: no {",
        ),
        ("Killed\n\n", "Killed"),
        ("", ""),
    ],
)
def test_the_error_of_the_client_is_its_exception(stderr: str, said: str) -> None:
    assert _message(stderr) == said


def test_a_tied_head_is_refused(demo_dir: Path, tmp_path: Path) -> None:
    model = bt.load(str(demo_dir))
    bt.quantize(model, "int8-weight-only", overrides=["skip=[]"])
    with pytest.raises(ExportError, match="tied"):
        bt.export(model, tmp_path / "out")


def test_a_directory_that_is_not_empty_is_left_alone(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    model = bt.load(str(tiny_dir))
    bt.quantize(model, "int4")
    with pytest.raises(OutputError, match="not empty"):
        bt.export(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_an_interrupted_export_leaves_nothing(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bittern_huggingface.compressed import write

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_save_config", interrupt)
    model = bt.load(str(tiny_dir))
    bt.quantize(model, "int4")
    with pytest.raises(KeyboardInterrupt):
        bt.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- planted faults ---


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


SCALE = "model.layers.1.self_attn.q_proj.weight_scale"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a scale doubled": (lambda p: edit_tensors(p, lambda t: t[SCALE].mul_(2)), SCALE),
    "a scale NaN": (lambda p: edit_tensors(p, lambda t: t[SCALE].fill_(float("nan"))), SCALE),
    "a scale zero": (lambda p: edit_tensors(p, lambda t: t[SCALE].zero_()), SCALE),
    "a scale gone": (lambda p: edit_tensors(p, lambda t: t.pop(SCALE)), SCALE),
    "a code changed": (
        lambda p: edit_tensors(p, lambda t: t["model.layers.0.mlp.up_proj.weight"][0, :1].neg_()),
        "model.layers.0.mlp.up_proj.weight",
    ),
    "a norm changed": (
        lambda p: edit_tensors(p, lambda t: t["model.norm.weight"].mul_(1.5)),
        "model.norm.weight",
    ),
    "a stray tensor": (
        lambda p: edit_tensors(p, lambda t: t.update(stray=torch.ones(1))),
        "stray",
    ),
    "a truncated file": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:1000]
        ),
        "model.safetensors",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "*.safetensors"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_verify_names_a_planted_fault(
    fault: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plant, name = FAULTS[fault]
    copy = Path(shutil.copytree(checkpoint("int8"), tmp_path / "copy"))
    plant(copy)
    verdict = bt.verify(copy)
    assert not verdict.ok
    assert name in {finding.tensor_or_field for finding in verdict.findings}


def unquantized_activations(config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None


def one_more_ignored(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")


def no_quantization(config: dict[str, Any]) -> None:
    config["quantization_config"]["quant_method"] = "modelopt"


@pytest.mark.parametrize("change", [unquantized_activations, one_more_ignored, no_quantization])
def test_verify_notices_a_wrong_config(
    change: Callable[[dict[str, Any]], None], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint("int8"), tmp_path / "copy"))
    edit_config(copy, change)
    assert not bt.verify(copy).ok


def test_verify_without_a_record_still_judges_structure_and_loading(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint("fp8-dynamic"), tmp_path / "copy"))
    (copy / "bittern.json").unlink()
    assert bt.verify(copy).ok
    edit_tensors(copy, lambda t: t.pop(SCALE))
    findings = bt.verify(copy).findings
    assert SCALE in {finding.tensor_or_field for finding in findings}


def test_a_model_that_is_not_quantized_is_no_export(tiny_dir: Path) -> None:
    with pytest.raises(VerificationError, match="not a quantized checkpoint"):
        bt.verify(tiny_dir)


def test_export_fails_loudly_when_the_client_disagrees(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that stores wrong scales must not pass its own verification."""
    from bittern_huggingface.compressed import write

    honest = write._packed

    def wrong(item: Any, scheme: Any) -> dict[str, torch.Tensor]:
        tensors = honest(item, scheme)
        tensors["weight_scale"] = tensors["weight_scale"] * 2
        return tensors

    monkeypatch.setattr(write, "_packed", wrong)
    model = bt.load(str(tiny_dir))
    bt.quantize(model, "int4")
    with pytest.raises(VerificationError, match="other values than were simulated"):
        bt.export(model, tmp_path / "out")


def test_the_record_is_no_safetensors_file_and_round_trips(
    checkpoint: Callable[[str], Path],
) -> None:
    record = ExportRecord.read(checkpoint("int8"))
    assert record is not None
    assert record.recipe == "int8"
    assert record.probe is not None
    assert len(record.weights) == 14
