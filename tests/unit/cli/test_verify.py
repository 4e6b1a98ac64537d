"""``bittern verify``."""

import pytest


@pytest.fixture
def exported(toy_bittern, tmp_path):
    out = tmp_path / "out"
    args = ("quantize", "toy:x", "-r", "int8-weight-only", "--output", out, "--no-verify")
    assert toy_bittern(*args).code == 0
    return out


def test_good_checkpoint(bittern, exported):
    done = bittern("verify", exported)
    assert (done.code, done.err) == (0, "")
    assert "verified by safetensors" in done.out
    found = bittern("verify", exported, "--json").json
    assert found["ok"] is True
    assert found["findings"] == []


def test_damaged_checkpoint_names_the_tensor_and_exits_2(bittern, exported):
    file = exported / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    done = bittern("verify", exported)
    assert done.code == 2
    assert "NOT verified" in done.out
    assert "changed since it was written" in done.out
    assert "1 finding," in done.err
    found = bittern("verify", exported, "--json").json
    assert found["ok"] is False
    assert found["error"] == "VerificationError"
    assert len(found["findings"]) == 1


def test_no_such_directory(bittern, tmp_path):
    assert bittern("verify", tmp_path / "nothing", "--json").json["error"] == "VerificationError"


def test_unknown_client_names_the_known(bittern, exported):
    done = bittern("verify", exported, "--client", "vllm", "--json")
    assert done.code == 2
    assert "safetensors" in done.json["hint"]
