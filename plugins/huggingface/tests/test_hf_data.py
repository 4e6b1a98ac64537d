from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bittern as bt
from bittern.errors import DataError
from bittern.records import DataConfig
from bittern.toolkit import default_toolkit


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> nn.Module:
    return bt.load(str(tiny_dir))


def read(source: object, model: nn.Module, **config: int) -> torch.Tensor:
    batches = default_toolkit().data(str(source), model, DataConfig(**config))
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(rows, torch.cat([b["input_ids"] for b in batches])), "not re-iterable"
    assert len(list(batches)) == len(batches)
    return rows


def test_npy_rows_are_taken_in_order(tmp_path: Path, model: nn.Module) -> None:
    array = np.arange(40, dtype=np.uint16).reshape(5, 8)
    np.save(tmp_path / "a.npy", array)
    rows = read(tmp_path / "a.npy", model, samples=3, batch_size=2)
    assert torch.equal(rows, torch.from_numpy(array[:3].astype(np.int64)))


def test_npy_rows_are_cut_to_seq_len(tmp_path: Path, model: nn.Module) -> None:
    np.save(tmp_path / "a.npy", np.arange(40).reshape(5, 8))
    assert read(tmp_path / "a.npy", model, seq_len=4).shape == (5, 4)


def test_a_flat_npy_becomes_rows(tmp_path: Path, model: nn.Module) -> None:
    np.save(tmp_path / "a.npy", np.arange(50))
    rows = read(tmp_path / "a.npy", model, seq_len=16)
    assert rows.shape == (3, 16)
    assert rows[1, 0] == 16


def test_text_is_tokenized_by_the_models_own_tokenizer(tmp_path: Path, model: nn.Module) -> None:
    text = "def main():\n    return 1\n" * 100
    (tmp_path / "a.txt").write_text(text)
    rows = read(tmp_path / "a.txt", model)
    assert rows.shape[1] == 64, "the model's own length"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    assert tokenizer.decode(rows.flatten()) == text[: len(tokenizer.decode(rows.flatten()))]


def test_jsonl_documents_are_joined_by_the_end_token(tmp_path: Path, model: nn.Module) -> None:
    lines = [json.dumps({"text": "import os"}), "", json.dumps({"text": "import sys"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path / "a.jsonl", model)
    assert (rows == 0).sum() == 1  # <|endoftext|> between the two


def test_a_short_text_is_one_short_row(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "a.txt").write_text("x = 1")
    rows = read(tmp_path / "a.txt", model)
    assert rows.shape[0] == 1
    assert 1 < rows.shape[1] < 64


def test_datasets_specs_are_read_by_the_datasets_library(tmp_path: Path, model: nn.Module) -> None:
    datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
    texts = ["import os\n" * 50, "import sys\n" * 50]
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(tmp_path / "d")
    rows = read(f"datasets:{tmp_path / 'd'},field=body", model, samples=2)
    assert rows.shape == (2, 64)
    with pytest.raises(DataError, match="no column 'text'"):
        read(f"datasets:{tmp_path / 'd'}", model)
    with pytest.raises(DataError, match="no option"):
        read(f"datasets:{tmp_path / 'd'},colour=red", model)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", "no usable text"),
        ("a.txt", b"   \n", "no usable text"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.jsonl", b"{}\n", "line 1 has no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("a.npy", b"nonsense", r"not a \.npy"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, model: nn.Module, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        read(tmp_path / name, model)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((2, 4), dtype=np.float32), "integers"),
        (np.zeros((2, 3, 4), dtype=np.int64), "shape"),
        (np.zeros((0, 4), dtype=np.int64), "no usable row"),
        (np.full((2, 4), 2048), "token id 2048"),
        (np.full((2, 4), -1), "token id -1"),
    ],
)
def test_bad_arrays_are_named(
    tmp_path: Path, model: nn.Module, array: np.ndarray, match: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=match):
        read(tmp_path / "a.npy", model)


def test_pickled_arrays_are_refused(tmp_path: Path, model: nn.Module) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        read(tmp_path / "a.npy", model)


@pytest.mark.parametrize("name", ["none.txt", "none.npy", "none.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, model: nn.Module, name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / name, model)


def test_an_unknown_kind_of_data_is_an_error(model: nn.Module) -> None:
    with pytest.raises(DataError, match="no plugin can read"):
        default_toolkit().data("data.parquet", model)


def test_text_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    (tmp_path / "a.txt").write_text("hello world")
    with pytest.raises(DataError, match="no tokenizer"):
        read(tmp_path / "a.txt", bt.load(str(tmp_path / "m")))
