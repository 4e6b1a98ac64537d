"""Calibration and evaluation data: text, JSON lines, token arrays, ``datasets`` specs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from bittern.errors import DataError
from bittern.reading import parse_json
from bittern.records import DataConfig
from bittern_huggingface.loading import source_of

__all__ = ["TokenBatches", "read_data"]

DATASETS = "datasets:"
LONGEST = 2048  # tokens per row where neither the user nor the model says


class TokenBatches:
    """Rows of token ids as batches ``{"input_ids": (rows, tokens)}``, as often as asked.

    Args:
        rows: ``(rows, tokens)``, int64.
        batch_size: Rows per batch.
    """

    def __init__(self, rows: Tensor, batch_size: int) -> None:
        self.rows = rows
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield {"input_ids": self.rows[start : start + self.batch_size]}


def read_data(source: str, model: nn.Module, config: DataConfig) -> TokenBatches | None:
    """Turn ``--data`` into batches of token ids.

    Args:
        source: A ``.txt``, ``.jsonl`` (field ``text``) or ``.npy`` file, or a ``datasets`` spec:
            ``datasets:PATH[,name=CONFIG][,split=train][,field=text]``.
        model: The model that takes the ids; its tokenizer is read from where it was loaded.
        config: Samples, row length, batch size.

    Returns:
        ``None`` for a source of another kind.

    Raises:
        DataError: The file is missing, unreadable, holds no usable row, or does not fit the model.
    """
    if config.samples is not None and config.samples < 1:
        raise DataError(f"{config.samples} samples are none", hint="--samples 128")
    path = Path(source)
    if source.startswith(DATASETS):
        rows = _tokenize(_dataset_texts(source), model, config, source)
    elif path.suffix == ".npy":
        rows = _array(path, config)
    elif path.suffix in (".txt", ".jsonl"):
        read = _lines if path.suffix == ".jsonl" else _text
        rows = _tokenize(read(path), model, config, source)
    else:
        return None
    if config.samples is not None:
        rows = rows[: config.samples]
    if rows.numel() == 0 or rows.shape[1] < 2:
        raise DataError(
            "the data holds no usable row of at least two tokens",
            where=source,
            hint="give more text, or a smaller --seq-len",
        )
    _check_vocabulary(rows, model, source)
    return TokenBatches(rows, config.batch_size)


def _check_vocabulary(rows: Tensor, model: nn.Module, source: str) -> None:
    get = getattr(model, "get_input_embeddings", None)
    size = getattr(get() if callable(get) else None, "num_embeddings", None)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (size is not None and high >= size):
        bad = low if low < 0 else high
        raise DataError(
            f"the data holds the token id {bad}, the vocabulary has {size} ids",
            where=source,
            hint="the data was made with another tokenizer; tokenize it with this model's",
        )


def _array(path: Path, config: DataConfig) -> Tensor:
    _check_file(path)
    try:  # mapped: a header may claim more than the file holds; no archive, no pickle
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises many kinds for a header that is none
        raise DataError(f"not a .npy file: {error}", where=str(path)) from error
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"token ids are integers, this array is {array.dtype}",
            where=str(path),
            hint="save ids, rows x tokens",
        )
    if array.ndim == 1:
        length = config.seq_len or min(LONGEST, len(array))
        array = array[: len(array) // max(length, 1) * length].reshape(-1, max(length, 1))
    if array.ndim != 2:
        raise DataError(f"expected rows x tokens, got the shape {array.shape}", where=str(path))
    array = array[: config.samples, : config.seq_len]
    return torch.from_numpy(array.astype(np.int64))


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), hint="check --data")


def _text(path: Path) -> Iterable[str]:
    _check_file(path)
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error}", where=str(path)) from error


def _lines(path: Path) -> Iterable[str]:
    _check_file(path)
    texts = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line, error=DataError, where=str(path), strict=False)
            except DataError as error:
                raise DataError(f"line {number}: {error.what}", where=str(path)) from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(
                    f"line {number} has no text field",
                    where=str(path),
                    hint='every line is an object like {"text": "..."}',
                )
            texts.append(text)
    return texts


def _dataset_texts(source: str) -> Iterable[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "reading a dataset needs the datasets package",
            where=source,
            hint="pip install 'bittern-huggingface[data]'",
        ) from error
    path, *options = source.removeprefix(DATASETS).split(",")
    known = {"name": None, "split": "train", "field": "text"}
    settings: dict[str, Any] = dict(known)
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            raise DataError(
                f"{option!r} is no option of a datasets spec",
                where=source,
                hint="datasets:PATH[,name=CONFIG][,split=train][,field=text]",
            )
        settings[key] = value
    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(path)
            found = found[settings["split"]] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(path, settings["name"], split=settings["split"])
    except Exception as error:  # datasets raises many kinds
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"datasets cannot load it: {line}", where=source) from error
    field = settings["field"]
    if field not in found.column_names:
        raise DataError(
            f"the dataset has no column {field!r}",
            where=source,
            hint=f"field= one of {', '.join(found.column_names)}",
        )
    return (row[field] for row in found)


def _tokenize(texts: Iterable[str], model: nn.Module, config: DataConfig, source: str) -> Tensor:
    """Tokenize texts, join them with the end-of-text token, and cut rows of one length."""
    tokenizer = _tokenizer(model)
    settings = getattr(model, "config", None)
    limit = getattr(settings, "max_position_embeddings", None) or LONGEST
    length = config.seq_len or min(LONGEST, limit)
    wanted = None if config.samples is None else config.samples * length
    ids: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if wanted is not None and len(ids) >= wanted:
            break
    if 1 < len(ids) < length:
        length = len(ids)  # one short row is better than none
    if len(ids) < 2:
        raise DataError(
            "the data holds no usable text", where=source, hint="give a file with some text in it"
        )
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length], dtype=torch.long).reshape(rows, length)


def _tokenizer(model: nn.Module) -> Any:
    source = source_of(model)
    name = (
        source.path
        if source is not None
        else getattr(getattr(model, "config", None), "name_or_path", "")
    )
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            "the model has no tokenizer to read text with",
            where=name or type(model).__name__,
            hint="put tokenizer.json into the model's directory, or give token ids as .npy",
        ) from error
