from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bittern as bt
from bittern.errors import ModelError
from bittern.records import LoadConfig
from bittern_huggingface.loading import source_of


def test_a_bfloat16_checkpoint_is_float32_on_a_cpu_and_remembers_its_dtype(tiny_dir: Path) -> None:
    model = bt.load(str(tiny_dir))
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    source = source_of(model)
    assert source is not None
    assert source.dtype == "bfloat16"


def test_a_dtype_can_be_asked_for(tiny_dir: Path) -> None:
    model = bt.load(str(tiny_dir), config=LoadConfig(dtype="bfloat16"))
    assert next(model.parameters()).dtype == torch.bfloat16


def test_an_unknown_dtype_is_an_error(tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match="float99"):
        bt.load(str(tiny_dir), config=LoadConfig(dtype="float99"))


def test_a_missing_directory_is_named() -> None:
    with pytest.raises(ModelError, match="there is no such directory"):
        bt.load("./no/such/model")


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        bt.load(str(tmp_path))


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_a_malformed_config_is_no_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        bt.load(str(tmp_path))


def test_weights_that_are_missing_are_an_error_not_random_numbers(
    tiny_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        bt.load(str(copy))


def test_a_truncated_file_is_an_error(tiny_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        bt.load(str(copy))


def test_custom_code_is_never_run(tiny_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        bt.load(str(copy))
    assert not (tmp_path / "ran").exists()
