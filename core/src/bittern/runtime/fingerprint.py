"""A short name for data: the same batches have the same one, in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Fingerprint"]


class Fingerprint:
    """Hashes batches as they go by.

    Attributes:
        value: ``"blake2b:..."`` of what was seen before `close`; ``""`` before that, and where
            nothing was seen.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen = False
        self._closed = False

    @property
    def value(self) -> str:
        """The fingerprint."""
        return f"blake2b:{self._hash.hexdigest()}" if self._closed and self._seen else ""

    def update(self, batch: Any) -> None:
        """Take a batch: nested mappings and sequences of tensors and plain values."""
        if not self._closed:
            self._seen = True
            self._update(batch)

    def close(self) -> None:
        """Take no more: a second pass over the same data adds nothing."""
        self._closed = True

    def _update(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._hash.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            self._hash.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._hash.update(f"{key}:".encode())
                self._update(item)
        elif isinstance(value, tuple | list):
            self._hash.update(f"[{len(value)}]".encode())
            for item in value:
                self._update(item)
        elif isinstance(value, str | int | float | bool | bytes | None):
            self._hash.update(repr(value).encode())
        else:
            self._hash.update(type(value).__qualname__.encode())
