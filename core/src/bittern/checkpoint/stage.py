"""One directory that several processes write together, whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bittern.errors import CheckpointError
from bittern.exporting import staged_directory
from bittern.runtime.ranks import agree, alone, is_first

__all__ = ["shared_stage"]


@contextmanager
def shared_stage(path: Path, *, replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield the `staged_directory` of rank 0 on all ranks, which have to see one file system.

    It gets its name when the block ended well on all ranks. In one process nothing is different.

    Args:
        path: The directory.
        replace: As for `staged_directory`.

    Raises:
        CheckpointError: A rank failed; raised on all of them, and nothing is left.
        OutputError: In one process: the path cannot be used.
    """
    if alone():
        with staged_directory(path, replace=replace) as stage:
            yield stage
        return
    with ExitStack() as own:
        opened = ""
        problem: Exception | None = None
        try:
            if is_first():
                opened = str(own.enter_context(staged_directory(path, replace=replace)))
        except Exception as error:
            problem = error
        stage = Path(agree(problem, opened, failure=CheckpointError)[0])
        try:
            yield stage
        except Exception as error:
            problem = error
        agree(problem, failure=CheckpointError)
        try:
            own.close()  # on rank 0 the directory gets its name
        except Exception as error:
            problem = error
    agree(problem, failure=CheckpointError)
