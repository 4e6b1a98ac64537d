"""Output directories that are whole or not there: write beside, rename at the end."""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bittern.errors import OutputError

__all__ = ["check_output", "staged_directory"]


def check_output(path: Path) -> None:
    """Raise unless ``path`` can become an output directory, before any work is done.

    Raises:
        OutputError: It exists and is not empty, or is a file, or cannot be looked at.
    """
    try:
        _check(path)
    except OSError as error:
        raise _explained(error, path) from error


def _check(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(
            "the output path exists and is not a directory",
            where=str(path),
            hint="choose another --output",
        )
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(
            "the output directory is not empty",
            where=str(path),
            hint="choose another --output, or remove it first",
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a directory", where=str(path))


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Yield a directory beside ``path``; rename it to ``path`` when the block ends well.

    When the block raises, Ctrl-C included, nothing is left.

    Raises:
        OutputError: The path cannot be used, or the disk is full.
    """
    check_output(path)
    path = path.absolute()
    created = [parent for parent in path.parents if not parent.exists()]  # innermost first
    stage = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")

    def clean() -> None:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()  # not tempfile.mkdtemp, which knows no umask
        yield stage
        check_output(path)
        if path.is_dir():
            path.rmdir()
        stage.rename(path)
    except OSError as error:
        clean()
        raise _explained(error, path) from error
    except BaseException as error:
        clean()
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OutputError(
                "the disk is full", where=str(path), hint="free space, or choose another --output"
            ) from error
        raise


def _explained(error: OSError, path: Path) -> OutputError:
    if error.errno == errno.ENOSPC:
        return OutputError(
            "the disk is full", where=str(path), hint="free space, or choose another --output"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            "no permission to write there", where=str(path), hint="choose another --output"
        )
    return OutputError(f"cannot write: {error}", where=str(path))
