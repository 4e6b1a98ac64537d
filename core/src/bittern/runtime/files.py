"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["write_beside"]


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside, and put it in its place when it is on the disk.

    Args:
        path: The file, of whose versions readers see the whole old or the whole new one.
        write: Writes the file that it is given.

    Raises:
        OSError: It cannot be written; what was there is there still.
    """
    stage = path.with_name(f".{path.name}.new")
    try:
        write(stage)
        with stage.open("rb") as file:
            os.fsync(file.fileno())
        stage.replace(path)
    except OSError:
        with suppress(OSError):
            stage.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
