"""Output directories are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bittern.errors import ExportError, OutputError
from bittern.exporting import check_output, staged_directory


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(stage: Path) -> None:
    (stage / "a.txt").write_text("a")
    (stage / "sub").mkdir()
    (stage / "sub" / "b.txt").write_text("b")


# --- success --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "new/deeper/out", "existing"])
def test_the_directory_appears_whole(name: str, tmp_path: Path) -> None:
    (tmp_path / "existing").mkdir()
    path = tmp_path / name
    with staged_directory(path) as stage:
        assert stage.parent == path.parent, "a rename must not cross file systems"
        assert stage.is_dir()
        fill(stage)
        assert not list(path.iterdir()) if path.exists() else True

    assert listing(path) == ["a.txt", "sub", "sub/b.txt"]
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_relative_path_stays_where_it_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_directory(Path("out")) as stage:
        monkeypatch.chdir(tmp_path / "elsewhere")
        fill(stage)

    assert (tmp_path / "out" / "a.txt").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_the_umask_is_respected(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with staged_directory(tmp_path / "out") as stage:
            fill(stage)
    finally:
        os.umask(before)

    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


# --- failure --------------------------------------------------------------------------------------


def fail(path: Path, error: BaseException) -> None:
    with staged_directory(path) as stage:
        fill(stage)
        raise error


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), ExportError("no")], ids=repr
)
@pytest.mark.parametrize("name", ["out", "new/deeper/out", "existing"])
def test_nothing_is_left_after_an_exception(
    error: BaseException, name: str, tmp_path: Path
) -> None:
    (tmp_path / "existing").mkdir()
    before = listing(tmp_path)
    with pytest.raises(type(error)) as caught:
        fail(tmp_path / name, error)

    assert caught.value is error
    assert listing(tmp_path) == before


def test_a_parent_that_somebody_else_uses_by_now_stays(tmp_path: Path) -> None:
    def work() -> None:
        with staged_directory(tmp_path / "new" / "out"):
            (tmp_path / "new" / "other.txt").write_text("theirs")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert listing(tmp_path) == ["new", "new/other.txt"]


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_a_full_disk_is_said_to_be_full_and_nothing_is_left(
    error: Exception, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="the disk is full") as caught:
        fail(tmp_path / "a" / "out", error)

    assert caught.value.__cause__ is error
    assert listing(tmp_path) == []


@pytest.mark.parametrize("step", ["mkdir", "rename"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "no permission to write there"),
        (errno.EROFS, "no permission to write there"),
        (errno.EIO, "cannot write: "),
    ],
    ids=["full", "denied", "readonly", "broken"],
)
def test_what_the_file_system_refuses_is_explained_and_nothing_is_left(
    step: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    original = getattr(Path, step)

    def sometimes(self: Path, *args: Any, **kwargs: Any) -> Any:
        if ".partial-" in self.name:
            refuse(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, step, sometimes)
    with (
        pytest.raises(OutputError, match=message) as caught,
        staged_directory(tmp_path / "a" / "out") as stage,
    ):
        fill(stage)
    monkeypatch.undo()

    assert caught.value.where == str(tmp_path / "a" / "out")
    assert listing(tmp_path) == []


# --- paths that cannot be used --------------------------------------------------------------------


@contextmanager
def never(path: Path) -> Iterator[None]:
    """The path is refused before any work is done, both early and late."""
    with pytest.raises(OutputError):
        check_output(path)
    with pytest.raises(OutputError) as caught, staged_directory(path):
        raise AssertionError("the work was started")
    assert caught.value.where == str(path)
    yield


def not_empty(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "theirs.txt").write_text("theirs")
    return folder / "out"


def hidden_file(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / ".hidden").touch()
    return folder / "out"


def a_file(folder: Path) -> Path:
    (folder / "out").touch()
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "deeper" / "out"


def a_link(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "out").symlink_to(folder / "real")
    return folder / "out"


def a_broken_link(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out"


@pytest.mark.parametrize(
    "prepare", [not_empty, hidden_file, a_file, below_a_file, a_link, a_broken_link]
)
def test_a_path_in_use_is_refused_and_untouched(
    prepare: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = prepare(tmp_path)
    before = listing(tmp_path)
    with never(path):
        assert listing(tmp_path) == before


def test_a_path_that_is_taken_meanwhile_is_refused_and_untouched(tmp_path: Path) -> None:
    def work() -> None:
        with staged_directory(tmp_path / "out") as stage:
            fill(stage)
            not_empty(tmp_path)

    with pytest.raises(OutputError, match="not empty"):
        work()
    assert listing(tmp_path) == ["out", "out/theirs.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission"), staged_directory(closed / "out"):
        raise AssertionError("the work was started")


@pytest.mark.parametrize("method", ["exists", "is_symlink", "is_dir"])
def test_a_path_that_cannot_even_be_looked_at_is_explained(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "out"
    monkeypatch.setattr(Path, method, refuse)
    for call in (check_output, lambda p: staged_directory(p).__enter__()):
        with pytest.raises(OutputError, match="no permission"):
            call(path)


@pytest.mark.parametrize("path", ["out", "a/b/out"])
def test_a_path_that_can_be_used_is_not_created_by_looking(path: str, tmp_path: Path) -> None:
    check_output(tmp_path / path)
    assert listing(tmp_path) == []
