"""Files beside the weights that a client needs and that quantization does not touch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from bittern_huggingface.loading import source_of

__all__ = ["copy_companions"]

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)


def copy_companions(model: nn.Module, path: Path) -> None:
    """Put the tokenizer and the like into ``path``, from where the model was loaded."""
    source = source_of(model)
    folder = Path(source.path) if source is not None else None
    if folder is None or not folder.is_dir():
        _save_tokenizer(model, path)
        return
    for file in _matching(folder):
        if not (path / file.name).exists():
            shutil.copyfile(file, path / file.name)


def _matching(folder: Path) -> Iterable[Path]:
    for pattern in COMPANIONS:
        yield from sorted(f for f in folder.glob(pattern) if f.is_file())


def _save_tokenizer(model: nn.Module, path: Path) -> None:
    """Save the tokenizer of a model from the hub; a model made in memory has none."""
    import transformers

    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        return
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return
    tokenizer.save_pretrained(path)
