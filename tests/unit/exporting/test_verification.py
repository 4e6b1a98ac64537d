"""Verification of core's own export: every planted fault is found, by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bittern.errors import BitternError, VerificationError
from bittern.nn import named_quantizers
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
ToolkitWith = Callable[..., Toolkit]

FILE = "model.safetensors"


def test_a_sound_checkpoint_is_verified(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    verdict = toolkit.verify(exported[1])

    assert verdict.ok
    assert verdict.findings == ()
    assert verdict.client == "safetensors"
    assert verdict.checks == ("10 tensors read back",)
    assert toolkit.verify(exported[1], "safetensors").ok


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda t: t.pop("up.bias"), ("up.bias", "is missing")),
        (lambda t: t.pop("up.weight_scale"), ("up.weight_scale", "is missing")),
        (lambda t: t.update(extra=torch.ones(1)), ("extra", "was not written by the export")),
        (lambda t: t["up.weight"].view(-1)[5].add_(1), ("up.weight", "changed since it was")),
        (lambda t: t.update({"up.bias": t["up.bias"].half()}), ("up.bias", "changed since")),
        (lambda t: t.update({"up.bias": t["up.bias"][None]}), ("up.bias", "changed since")),
        (lambda t: t["down.input_scale"].mul_(-1), ("down.input_scale", "changed since")),
    ],
    ids=["missing", "no scale", "extra", "code", "dtype", "shape", "sign"],
)
def test_a_planted_fault_is_found_by_name(
    change: Any, finding: tuple[str, str], exported: tuple[Any, Path], toolkit: Toolkit
) -> None:
    rewrite(exported[1], change)
    verdict = toolkit.verify(exported[1])

    assert not verdict.ok
    (found,) = verdict.findings
    assert found.tensor_or_field == finding[0]
    assert found.problem.startswith(finding[1])
    assert found.remedy


def test_any_flipped_bit_of_the_file_is_found(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    path = exported[1]
    sound = (path / FILE).read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", sound[:8])[0]
    places = [*range(header), *rng.integers(header, len(sound), 200).tolist()]
    for place in places:
        broken = bytearray(sound)
        broken[place] ^= 1 << int(rng.integers(0, 8))
        (path / FILE).write_bytes(broken)
        assert not toolkit.verify(path).ok, f"byte {place} of {len(sound)} (header {header})"


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_found(keep: int, exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    file = exported[1] / FILE
    file.write_bytes(file.read_bytes()[:keep])
    verdict = toolkit.verify(exported[1])

    assert not verdict.ok
    assert verdict.findings[0].tensor_or_field == FILE
    assert verdict.findings[0].problem.startswith("cannot be read")


def test_a_missing_file_is_found(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    (exported[1] / FILE).unlink()
    assert not toolkit.verify(exported[1]).ok


def edited(path: Path, **changes: Any) -> None:
    data = json.loads((path / "bittern.json").read_text())
    data.update(changes)
    (path / "bittern.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '"text"', "{}", '{"schema": "new"}', '{"format": "x", "hue": 1}'],
)
def test_a_malformed_record_is_an_error_that_names_the_file(
    content: str, exported: tuple[Any, Path], toolkit: Toolkit
) -> None:
    (exported[1] / "bittern.json").write_text(content)
    with pytest.raises(VerificationError, match="malformed") as caught:
        toolkit.verify(exported[1])
    assert caught.value.where == str(exported[1] / "bittern.json")


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": []},
        {"tensors": 3},
        {"weights": "x"},
        {"entries": {}},
        {"probe": 3},
        {"probe": {}},
    ],
    ids=str,
)
def test_a_record_with_a_field_of_another_kind_is_malformed(
    change: dict[str, Any], exported: tuple[Any, Path], toolkit: Toolkit
) -> None:
    edited(exported[1], **change)
    with pytest.raises(VerificationError, match="malformed"):
        toolkit.verify(exported[1])


def test_a_binary_record_is_malformed(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    (exported[1] / "bittern.json").write_bytes(b"\xff\x00")
    with pytest.raises(VerificationError, match="not UTF-8"):
        toolkit.verify(exported[1])


def test_a_record_of_a_newer_version_says_so(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    edited(exported[1], schema=2, bittern="9.0", unheard_of=1)
    with pytest.raises(
        VerificationError, match=r"written by bittern 9\.0, which is newer"
    ) as caught:
        toolkit.verify(exported[1])
    assert caught.value.hint == "pip install -U bittern"


def test_an_unknown_format_in_the_record_is_an_error(
    exported: tuple[Any, Path], toolkit: Toolkit
) -> None:
    edited(exported[1], format="gguf")
    with pytest.raises(BitternError, match="unknown export format 'gguf'"):
        toolkit.verify(exported[1])


@pytest.mark.parametrize(
    "config",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"quantization_config": null}',
        '{"quantization_config": {"quant_method": "x"}}',
    ],
)
def test_what_is_no_checkpoint_is_an_error(
    config: str | None, tmp_path: Path, toolkit: Toolkit
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(VerificationError) as caught:
        toolkit.verify(tmp_path)
    assert str(tmp_path) in (caught.value.where or "")


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path, toolkit: Toolkit) -> None:
    with pytest.raises(VerificationError, match="no such directory"):
        toolkit.verify(tmp_path / "nowhere")


def test_an_unknown_client_is_an_error_that_names_the_known_one(
    exported: tuple[Any, Path], toolkit: Toolkit
) -> None:
    with pytest.raises(VerificationError, match="client 'vllm' cannot be run") as caught:
        toolkit.verify(exported[1], "vllm")
    assert caught.value.hint == "known: safetensors"


def test_export_verifies_what_it_wrote(
    make_mlp: Make,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
    tmp_path: Path,
) -> None:
    def after_export(path: Path) -> None:
        rewrite(path, lambda t: t.pop("up.bias"))

    toolkit = toolkit_with(make_plugin("alpha", after_export=after_export))
    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    with pytest.raises(VerificationError, match=r"up\.bias: is missing \(1 findings in all\)"):
        toolkit.export(model, tmp_path / "one")
    toolkit.export(model, tmp_path / "two", verify=False)
    assert dict(named_quantizers(model))
