"""Models and data of strangers: one clear error, no code of theirs, no pickle."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bittern as bt
from bittern.errors import BitternError, DataError, ModelError
from bittern.records import DataConfig
from bittern_huggingface.data import read_data

ODD: list[Any] = [None, -1, 1e308, "../x", [], [1], {"x": 1}]
KEYS = ["architectures", "model_type", "hidden_size", "num_attention_heads", "vocab_size", "dtype"]


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dir, tmp_path / "copy")


def changed(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_any_config_loads_or_is_one_error(copy: Path) -> None:
    whole = (copy / "config.json").read_text()
    refused = 0
    for key in KEYS:
        for value in ODD:
            (copy / "config.json").write_text(whole)
            changed(copy, **{key: value})
            try:
                bt.load(str(copy))
            except BitternError:
                refused += 1
    assert refused > 10


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "AutoTokenizer", "LlamaConfig", "x"])
def test_only_models_are_loaded_whatever_the_config_names(name: str, copy: Path) -> None:
    changed(copy, architectures=[name])
    assert type(bt.load(str(copy))).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("known", [True, False], ids=["known type", "own type"])
def test_code_beside_a_model_never_runs(
    known: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = copy / "it-ran"
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (copy / name).write_text(f"open({str(marker)!r}, 'w')\nclass MineConfig: pass\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    auto = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "modeling_mine.Mine"}
    changed(copy, auto_map=auto, **({} if known else {"model_type": "mine"}))
    if known:
        bt.load(str(copy))
    else:
        with pytest.raises(ModelError, match="code from its own repository"):
            bt.load(str(copy))
    assert not marker.exists()
    assert not asked, "nobody is asked whether code may run"


def test_remote_code_is_turned_on_nowhere(source_files: list[Path]) -> None:
    """Only Auto classes run code; without the switch they would ask in a terminal."""
    for file in source_files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", file
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            if called and re.fullmatch(r"(transformers\.)?Auto\w+\.from_pretrained", called):
                assert "trust_remote_code" in {k.arg for k in node.keywords}, file


@pytest.fixture
def source_files() -> list[Path]:
    import bittern_huggingface

    found = sorted(Path(bittern_huggingface.__file__).parent.rglob("*.py"))
    assert found
    return found


def test_pickled_weights_are_not_read(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        unpickled.append(True)
        raise ValueError("pickled")

    unpickled: list[bool] = []
    monkeypatch.setattr(torch, "load", refuse)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "it-ran")))
    with pytest.raises(ModelError):
        bt.load(str(copy))
    assert not unpickled, "not even by the loader that takes only weights"
    assert not (tmp_path / "it-ran").exists()


def lying(shape: tuple[int, ...], dtype: str = "<i8") -> bytes:
    """Return an array file with a header that claims more than there is."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + bytes(64)


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3, dtype=np.int64))
    return file.getvalue()


ARRAYS: dict[str, Callable[[Path], bytes]] = {
    "claims a terabyte": lambda _: lying((2**20, 2**17)),
    "claims more than numbers go": lambda _: lying((2**62, 2**62)),
    "a negative shape": lambda _: lying((-1, 4)),
    "objects": lambda _: lying((1,), "|O"),
    "an archive": lambda _: archive(),
    "a pickle": lambda folder: pickle.dumps(Trap(folder / "it-ran")),
    "a header that is code": lambda _: b"\x93NUMPY\x01\x00\x10\x00__import__('os')\n",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_lie_are_one_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(ARRAYS[name](tmp_path))
    with pytest.raises(DataError):
        read_data(str(tmp_path / "a.npy"), nn.Linear(1, 1), DataConfig())
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"text": "\xff"}', b'{"text": "\\ud800"}'])
def test_lines_that_are_none_are_one_error(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(DataError, match="line 2"):
        read_data(str(tmp_path / "a.jsonl"), nn.Linear(1, 1), DataConfig())
