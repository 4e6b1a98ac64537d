"""What the file system does for an output directory: lock, sync, exchange; its errors in words."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from bittern.errors import OutputError

__all__ = ["exchange", "explained", "lock", "out_of_space", "sync", "sync_tree"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
# No system call, or a file system without it: both can rename one after the other.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
# The disk, the user's share of it, or the largest file that a process may write.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|{os.strerror(errno.ENOSPC)}")


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories at one instant; ``False`` where this system cannot.

    Raises:
        OSError: The system can, and refused.
    """
    rename = _renameat2()
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@cache
def _renameat2() -> Any:
    """Return ``renameat2`` of the C library; ``None`` where it has none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )
    return function


def lock(directory: Path) -> int | None:
    """Lock a directory for as long as this process lives; return the descriptor that holds it.

    Returns:
        ``None`` where directories cannot be locked.

    Raises:
        BlockingIOError: A living process has it.
        FileNotFoundError: It is not there any more.
    """
    try:
        import fcntl
    except ImportError:
        return None
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(held).st_ino != directory.stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    except (BlockingIOError, FileNotFoundError):
        os.close(held)
        raise
    except OSError:
        os.close(held)
        return None
    return held


def sync(path: Path) -> None:
    """Have what was written to a file or directory reach the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # nothing to sync, as in a pipe
            raise
    finally:
        os.close(held)


def sync_tree(directory: Path) -> None:
    """Have a directory and everything in it reach the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                sync(file)
        if os.name == "posix":
            sync(Path(folder))


def out_of_space(error: BaseException) -> bool:
    """Whether an error says that there was no room left, also one that is no `OSError`."""
    with suppress(AttributeError):
        if error.errno in _FULL:  # type: ignore[attr-defined]
            return True
    return _FULL_TEXT.search(str(error)) is not None


def explained(error: OSError, path: Path) -> OutputError:
    """Return what the system said as an error of the output ``path``."""
    if out_of_space(error):
        return OutputError(
            "the disk is full", where=str(path), hint="free space, or choose another --output"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            "no permission to write there", where=str(path), hint="choose another --output"
        )
    return OutputError(f"cannot write: {error}", where=str(path))
