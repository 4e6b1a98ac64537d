"""Makes sure that nobody pickles: a pickle runs code when it is loaded."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

__all__ = ["no_pickle"]


@contextmanager
def no_pickle() -> Iterator[None]:
    """Let everything that pickles or unpickles raise while the block runs.

    Raises:
        AssertionError: In the block, where ``pickle``, ``torch.save`` or ``torch.load`` is used.
    """

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was used; write safetensors and JSON instead")

    patches = [
        *(mock.patch.object(pickle, n, refuse) for n in ("load", "loads", "dump", "dumps")),
        mock.patch.object(pickle, "Unpickler", refuse),
        mock.patch.object(pickle, "Pickler", refuse),
        mock.patch.object(torch, "load", refuse),
        mock.patch.object(torch, "save", refuse),
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
