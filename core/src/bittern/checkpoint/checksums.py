"""Checksums that cost less than the copy that loading makes: a changed bit is not loaded.

They find accidents of disks and networks, and files of different saves. They are no signature:
whoever can write the files can write the checksums.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bittern.errors import CheckpointError

__all__ = ["check_file", "data_checksum", "file_checksum"]

WORDS = 512  # of 8 bytes: a page, which is what disks and networks lose or exchange


def file_checksum(path: Path) -> int:
    """Return a checksum of a file's bytes.

    It is the CRC-32 of the sums of the words of every 4 KiB, and of what is left at the end: any
    bit that changed shows, and any block in another place. A CRC-32 of all bytes takes eight times
    as long, more than loading does.

    Raises:
        OSError: The file cannot be read.
    """
    if not path.stat().st_size:
        return 0
    data = np.memmap(path, dtype=np.uint8, mode="r")
    summed = len(data) // (WORDS * 8) * WORDS * 8
    found = zlib.crc32(str(len(data)).encode())
    if summed:
        blocks = data[:summed].view("<i8").reshape(-1, WORDS)
        found = zlib.crc32(np.add.reduce(blocks, axis=1).data, found)
    return zlib.crc32(data[summed:].data, found)


def check_file(path: Path, wanted: int) -> None:
    """Raise unless a file is what was saved.

    Args:
        path: A file that is known to be a regular one.
        wanted: Its `file_checksum` then.

    Raises:
        CheckpointError: It changed, or cannot be read.
    """
    try:
        same = file_checksum(path) == wanted
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
    if not same:
        raise CheckpointError(
            "changed since it was saved, or is of another save",
            where=str(path),
            hint="copy or download the whole directory again",
        )


def data_checksum(data: Mapping[str, Any]) -> int:
    """Return the CRC-32 of plain data, however it is laid out in a file."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())
