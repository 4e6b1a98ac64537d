"""Checksums that cost less than the copy that loading makes: a changed bit is not loaded.

They find accidents of disks and networks, and files of different saves. They are no signature:
whoever can write the files can write the checksums.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bittern.errors import CheckpointError

__all__ = ["check_tensors", "checksum_of", "data_checksum", "tensor_checksums"]

WORDS = 4096  # of 8 bytes; a row stays in the first cache


def checksum_of(tensor: Tensor) -> int:
    """Return a checksum of a tensor's bytes, dtype and shape.

    It is the CRC-32 of the tensor folded to 32 KiB: words that are a multiple of 32 KiB apart are
    added up. A CRC-32 of all bytes takes four times as long, more than loading does.

    Args:
        tensor: Any dtype and shape.
    """
    whole = tensor.detach().cpu().contiguous()
    if whole.is_conj() or whole.is_neg():
        whole = whole.resolve_conj().resolve_neg()
    found = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    data = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy()
    folded = len(data) // (WORDS * 8) * WORDS * 8
    if folded:
        rows = data[:folded].view("<i8").reshape(-1, WORDS)
        found = zlib.crc32(np.add.reduce(rows, axis=0).data, found)
    return zlib.crc32(data[folded:].data, found)


def tensor_checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the checksum of every tensor."""
    return {name: checksum_of(tensor) for name, tensor in tensors.items()}


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, int], *, where: str) -> None:
    """Raise unless these are the tensors that were saved.

    Raises:
        CheckpointError: One is missing, was not saved, or changed.
    """
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} was not saved with it" for name in tensors if name not in wanted]
    if not problems:
        problems = [
            f"{name} changed since it was saved"
            for name, tensor in tensors.items()
            if checksum_of(tensor) != wanted[name]
        ]
    if problems:
        raise CheckpointError(
            f"the tensors are not those that were saved: {'; '.join(problems[:3])}",
            where=where,
            hint="copy or download the whole directory again",
        )


def data_checksum(data: Mapping[str, Any]) -> int:
    """Return the CRC-32 of plain data, however it is laid out in a file."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())
