"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bittern.errors import DataError

__all__ = [
    "batch_option",
    "check_data_file",
    "load_options",
    "model_argument",
    "recipe_options",
    "seq_len_option",
]

F = TypeVar("F", bound=Callable[..., Any])

model_argument = click.argument("model")

seq_len_option = click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    help="Tokens per row; the data's or the model's own length by default.",
)

batch_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows per batch."
)


def recipe_options(function: F) -> F:
    """Add ``--recipe`` and ``-o``."""
    function = click.option(
        "-o",
        "--override",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change the recipe: strict=false, rules.0.input=fp8; repeatable.",
    )(function)
    return click.option(
        "-r",
        "--recipe",
        required=True,
        help="A recipe's name (see `bittern recipes`) or YAML file.",
    )(function)


def load_options(function: F) -> F:
    """Add ``--dtype`` and ``--device``."""
    function = click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Device to load to; auto is a GPU when there is one, disk is for models larger than "
        "memory.",
    )(function)
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Dtype to load in; auto is float32 on a CPU, the checkpoint's own elsewhere.",
    )(function)


def check_data_file(source: str | None) -> None:
    """Refuse a file that is not there, before the model is loaded.

    What other sources mean (a directory, a dataset's name) only plugins know.

    Raises:
        DataError: ``source`` names a text or token file that does not exist.
    """
    if source is None or ":" in source or not source.endswith((".txt", ".jsonl", ".npy")):
        return
    if not Path(source).exists():
        raise DataError("there is no such file", where=source, hint="check the path")
