"""``bittern inspect``."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import bittern as bt
from bittern.reading import TensorHeader


@pytest.fixture
def exported(toy_bittern, tmp_path, data):
    out = tmp_path / "out"
    args = ("quantize", "toy:x", "-r", "int8", "--data", data(8), "--output", out)
    done = toy_bittern(*args)
    assert done.code == 0, done.err
    return out


def test_export_of_bittern(bittern, exported):
    done = bittern("inspect", exported)
    assert (done.code, done.err) == (0, "")
    assert "bittern export" in done.out
    assert "weight: int8/channel" in done.out
    assert "I8" in done.out


def test_export_as_json(bittern, exported):
    found = bittern("inspect", exported, "--json").json
    assert found["kind"] == "bittern export"
    assert found["bittern"]["recipe"] == "int8"
    assert found["bittern"]["quantized_modules"] == 2
    assert found["formats"] == [
        {"modules": "{1,3}", "count": 2, "slots": ["weight: int8/channel", "input: int8/tensor"]}
    ]
    assert found["bytes_by_dtype"]["I8"] == 8 * 8 + 16 * 8
    assert found["bytes"] == sum(found["bytes_by_dtype"].values())
    assert sum(t["bytes"] for t in found["tensors"]) == found["bytes"]


@pytest.fixture
def state(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 4))
    bt.quantize(model, "w4a8", [torch.randn(8, 32)])
    bt.save(model, tmp_path / "state")
    return tmp_path / "state"


def test_saved_state(bittern, state):
    done = bittern("inspect", state)
    assert (done.code, done.err) == (0, "")
    assert "bittern state" in done.out
    assert "recipe=w4a8, 4 quantizers" in done.out
    assert "weight: int4/group" in done.out


def test_saved_state_as_json(bittern, state):
    found = bittern("inspect", state, "--json").json
    assert found["kind"] == "bittern state"
    assert found["state"]["weights"] is True
    (mode,) = found["state"]["modes"]
    assert (mode["name"], mode["quantizers"]) == ("quantize", 4)
    assert mode["metadata"]["calibration"]["batches"] == 1
    assert sum(f["count"] for f in found["formats"]) == 2


def test_damaged_state(bittern, state):
    (state / "manifest.json").write_text('{"schema": 3}')
    done = bittern("inspect", state)
    assert done.code != 0
    assert "malformed" in done.err


def test_quantized_checkpoint_of_another_tool(bittern, tmp_path):
    scheme = {"num_bits": 8, "type": "int", "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs}
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config = {"architectures": ["Llama"], "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for i in range(3):
        tensors[f"layers.{i}.fc.weight"] = torch.zeros(4, 6, dtype=torch.int8)
        tensors[f"layers.{i}.fc.weight_scale"] = torch.ones(4, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    found = bittern("inspect", tmp_path, "--json").json
    assert found["kind"] == "quantized checkpoint"
    assert found["bittern"] is None
    assert found["formats"] == [
        {"modules": "layers.{0..2}.fc", "count": 3, "slots": ["weight: I8"]}
    ]
    assert found["quantization"]["groups"] == [
        {"targets": ["Linear"], "weights": "int8/channel", "inputs": "int8/token/dynamic"}
    ]
    assert found["quantization"]["ignored"] == ["lm_head"]
    done = bittern("inspect", tmp_path)
    assert done.code == 0
    assert "int8/token/dynamic" in done.out


def test_plain_model_counts_every_dtype(bittern, tmp_path):
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(2, dtype=torch.bool),
        "d": torch.zeros(4).to(torch.float8_e4m3fn),
        "e": torch.zeros(2, 0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "old.bin").write_bytes(b"")
    found = bittern("inspect", tmp_path, "--json").json
    assert found["kind"] == "plain model"
    assert found["bytes_by_dtype"] == {"F32": 60, "BF16": 14, "F8_E4M3": 4, "BOOL": 2}
    assert found["pickled"] == ["old.bin"]
    assert "old.bin" in bittern("inspect", tmp_path).out


@pytest.mark.parametrize(
    ("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("I64", 64), ("BOOL", 8)]
)
def test_bytes_by_the_name_of_the_dtype(dtype, bits):
    assert TensorHeader("x", dtype, (3, 5)).bytes == math.ceil(15 * bits / 8)


def test_inspecting_a_plain_model_does_without_torch(python, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    code = """
    import sys
    from bittern.cli.main import main
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 0
    assert "torch" not in sys.modules
    """
    done = python(code, "inspect", str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("model.safetensors", b"rubbish", "ModelError"),
        ("config.json", b"{", "ModelError"),
        ("config.json", b"[]", "ModelError"),
        ("bittern.json", b"{", "VerificationError"),
        ("bittern.json", b'{"schema": 99, "bittern": "9.9"}', "VerificationError"),
        ("notes.txt", b"", "ModelError"),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(bittern, tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    done = bittern("inspect", tmp_path, "--json")
    assert done.code == 2
    assert done.json["error"] == error
    assert done.json["where"].startswith(str(tmp_path))


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_not_a_directory(bittern, tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("x")
    assert bittern("inspect", path, "--json").json["error"] == "ModelError"
