"""What happens beside an output directory: replacement, locks, and what killed processes left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bittern.errors import OutputError
from bittern.exporting import check_output, disk, left_aside, staged_directory
from bittern.exporting.directory import _host


def anything(_: Path) -> bool:
    return True


def write(path: Path, text: str, *, replace: Callable[[Path], bool] | None = anything) -> None:
    with staged_directory(path, replace=replace) as stage:
        (stage / "a.txt").write_text(text)


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture(params=["exchange", "rename"])
def out(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A directory that is there, on systems that can exchange two and on others."""
    if request.param == "rename":
        monkeypatch.setattr("bittern.exporting.directory.exchange", lambda *_: False)
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more.txt").touch()
    yield tmp_path / "out"
    assert hidden(tmp_path) == []


def test_the_new_directory_takes_the_place_of_the_old_one(out: Path) -> None:
    write(out, "new")
    assert [p.name for p in out.iterdir()] == ["a.txt"]
    assert (out / "a.txt").read_text() == "new"


def test_an_error_leaves_the_old_one(out: Path) -> None:
    def fail() -> None:
        with staged_directory(out, replace=anything) as stage:
            (stage / "a.txt").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (out / "a.txt").read_text() == "old"


def test_who_owns_it_is_asked_before_the_work_and_after_it(out: Path) -> None:
    answers = [False, True, False]

    def ask(path: Path) -> bool:
        assert path == out
        return answers.pop(0)

    for _ in range(2):
        with pytest.raises(OutputError, match="holds more than what would take its place"):
            write(out, "new", replace=ask)
    assert answers == []
    assert (out / "a.txt").read_text() == "old"


@pytest.mark.parametrize("name", ["[a-z]*", "?", "[out]", "..."])
def test_names_that_are_patterns_mean_themselves(name: str, tmp_path: Path) -> None:
    stranger = tmp_path / f".z.partial-01234567-{_host()}"
    stranger.mkdir()
    for text in ("old", "new"):
        write(tmp_path / name, text)
    assert (tmp_path / name / "a.txt").read_text() == "new"
    assert stranger.exists()


def test_links_and_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(OutputError, match="is not a directory"):
            check_output(tmp_path / name, replace=anything)


# --- what killed processes left -------------------------------------------------------------------


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-01234567-{_host()}"
    (left / "deep").mkdir(parents=True)
    write(tmp_path / "out", "new")
    assert hidden(tmp_path) == []


def test_what_is_not_ours_or_of_another_host_stays(tmp_path: Path) -> None:
    names = [".out.partial-01234567-00000000", f".other.partial-01234567-{_host()}", ".out.swp"]
    for name in names:
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "new")
    assert hidden(tmp_path) == sorted(names)


def test_what_a_living_process_fills_stays(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from bittern.exporting import staged_directory
with staged_directory(pathlib.Path({str(tmp_path / "out")!r})) as stage:
    (stage / "b.txt").write_text("theirs")
    print(stage, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        stage = Path(other.stdout.readline().strip())
        write(tmp_path / "out", "ours")
        assert (stage / "b.txt").read_text() == "theirs"
        other.kill()
        other.wait()
    write(tmp_path / "out", "ours again")
    assert hidden(tmp_path) == []


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    held = disk.lock(tmp_path)
    assert held is not None
    with pytest.raises(BlockingIOError):
        disk.lock(tmp_path)
    os.close(held)
    again = disk.lock(tmp_path)
    assert again is not None
    os.close(again)


def test_a_directory_that_was_left_aside_is_named_and_put_back(tmp_path: Path) -> None:
    """A process was killed between two renames, on a system that cannot exchange directories."""
    out = tmp_path / "out"
    write(out, "old")
    aside = out.rename(tmp_path / ".out.before-01234567")
    assert left_aside(out) == aside
    with pytest.raises(OutputError, match="is not empty"):
        write(out, "new", replace=None)
    assert (out / "a.txt").read_text() == "old"
    assert left_aside(out) is None


# --- the system -----------------------------------------------------------------------------------


def test_two_directories_are_exchanged(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not disk.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange directories")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        disk.exchange(tmp_path / "a", tmp_path / "c")


def test_a_system_without_the_call_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "_renameat2", lambda: None)
    assert not disk.exchange(tmp_path, tmp_path)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_not_asked_for_it(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    disk._renameat2.cache_clear()
    assert disk._renameat2() is None
    disk._renameat2.cache_clear()


def test_everything_reaches_the_disk_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def watched_sync(number: int) -> None:
        events.append(Path(f"/proc/self/fd/{number}").readlink().name.partition(".partial")[0])
        sync(number)

    def watched_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name what is synced")
    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    with staged_directory(tmp_path / "out") as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "a.txt").write_text("a")
        (stage / "b.txt").write_text("b")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before) == [".out", "a.txt", "b.txt", "sub"]
    assert after == [tmp_path.name]
