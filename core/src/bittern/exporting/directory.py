"""Output directories that are whole or not there: write beside, exchange at the end.

A stage is a hidden directory beside the output, locked by the process that fills it. The kernel
drops the lock when the process ends, however it ends, so that the next writer can tell what a
killed one left from what a living one is filling.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from platform import node
from zlib import crc32

from bittern.errors import OutputError
from bittern.exporting.disk import exchange, explained, lock, out_of_space, sync, sync_tree

__all__ = ["check_output", "left_aside", "staged_directory"]

Replaceable = Callable[[Path], bool]


def check_output(path: Path, *, replace: Replaceable | None = None) -> None:
    """Raise unless ``path`` can become an output directory, before any work is done.

    Args:
        path: The directory.
        replace: Says whether a directory that is not empty may be replaced; none may by default.

    Raises:
        OutputError: It exists and is not empty, or is a file, or cannot be looked at.
    """
    try:
        _check(path, replace)
    except OSError as error:
        raise explained(error, path) from error


def _check(path: Path, replace: Replaceable | None) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(
            "the output path exists and is not a directory",
            where=str(path),
            hint="choose another --output",
        )
    if path.is_dir() and any(path.iterdir()) and (replace is None or not replace(path)):
        what = "the output directory is not empty"
        what += "" if replace is None else ", and holds more than what would take its place"
        raise OutputError(what, where=str(path), hint="choose another --output, or remove it first")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a directory", where=str(path))


@contextmanager
def staged_directory(path: Path, *, replace: Replaceable | None = None) -> Iterator[Path]:
    """Yield a directory beside ``path``; give it that name when the block ends well.

    When the block raises, Ctrl-C included, nothing is left and ``path`` is what it was. When the
    process is killed or the power fails, ``path`` is whole all the same, the old or the new one;
    what was left beside it is removed by the next call.

    Args:
        path: The directory; there may be an empty one.
        replace: Says whether a directory that is not empty may be replaced; none may by default.

    Raises:
        OutputError: The path cannot be used, or the disk is full.
    """
    path = path.absolute()
    _put_back(path)
    check_output(path, replace=replace)
    created = [parent for parent in path.parents if not parent.exists()]  # innermost first
    stage: Path | None = None
    held: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        stage, held = _make_stage(path)
        yield stage
        sync_tree(stage)
        check_output(path, replace=replace)
        _publish(stage, path)
    except BaseException as error:
        _remove(stage)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise explained(error, path) from error
        if out_of_space(error):
            raise OutputError(
                "the disk is full", where=str(path), hint="free space, or choose another --output"
            ) from error
        raise
    finally:
        if held is not None:
            os.close(held)


def left_aside(path: Path) -> Path | None:
    """Return the whole directory that was moved away from ``path`` by a process that was killed.

    Only file systems that cannot exchange two directories at once leave one.
    """
    path = path.absolute()
    with suppress(OSError):
        if not path.exists():
            return next(_asides(path), None)
    return None


def _publish(stage: Path, path: Path) -> None:
    """Give ``stage`` the name ``path``; what has it now is removed afterwards."""
    if not path.exists() or not any(path.iterdir()):
        stage.rename(path)  # takes the place of an empty directory, too
        sync(path.parent)
        return
    aside = path.with_name(f".{path.name}.before-{secrets.token_hex(4)}")
    if exchange(stage, path):
        aside = stage
    else:
        path.rename(aside)
        try:
            stage.rename(path)
        except BaseException:
            with suppress(OSError):
                aside.rename(path)
            raise
    sync(path.parent)  # before the old one goes
    for old in (aside, *_asides(path)):
        _remove(old)


def _put_back(path: Path) -> None:
    aside = left_aside(path)
    if aside is not None:
        with suppress(OSError):
            aside.rename(path)


def _make_stage(path: Path) -> tuple[Path, int | None]:
    """Make a directory beside ``path`` and lock it."""
    while True:
        stage = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}-{_host()}")
        stage.mkdir()  # not tempfile.mkdtemp, which knows no umask
        try:
            return stage, lock(stage)
        except (BlockingIOError, FileNotFoundError):  # taken for a stale one before it was locked
            continue


def _remove_stale(path: Path) -> None:
    """Remove what killed processes of this host left beside ``path``.

    Locks of other hosts may not be visible here, so theirs is left alone.
    """
    for stage in path.parent.glob(f".{_quoted(path.name)}.partial-????????-{_host()}"):
        with suppress(OSError):
            held = lock(stage)
            if held is not None:
                _remove(stage)
                os.close(held)


def _asides(path: Path) -> Iterator[Path]:
    """Yield what was moved away from ``path`` where directories cannot be exchanged."""
    return path.parent.glob(f".{_quoted(path.name)}.before-????????")


def _remove(directory: Path | None) -> None:
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def _host() -> str:
    return f"{crc32(node().encode()):08x}"


def _quoted(name: str) -> str:
    """Return a pattern of `Path.glob` that stands for this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
