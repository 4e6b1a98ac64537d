"""A save that is killed, or finds the disk full: the old or the new checkpoint is whole.

Processes are forked, not started: a save is killed at an instant of its own choosing (every line
of our code, by a trace function), and at random ones.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import bittern.checkpoint.save as saving
from bittern.checkpoint import save_state
from bittern.errors import OutputError
from bittern.exporting import disk, left_aside
from bittern.toolkit import Toolkit

STEPS = ("save.py", "manifest.py", "directory.py", "disk.py", "shutil.py")


def build(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def models(toolkit: Toolkit) -> list[nn.Sequential]:
    """Two models of one architecture, quantized."""
    found = [build(0), build(1)]
    for model in found:
        toolkit.quantize(model, "int8-weight-only")
    return found


@pytest.fixture(params=["exchange", "rename"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Directories are exchanged, or renamed one after the other where that is not there."""
    if request.param == "rename":
        monkeypatch.setattr("bittern.exporting.directory.exchange", lambda *_: False)
    elif disk._renameat2() is None:
        pytest.skip("this system cannot exchange directories")
    return str(request.param)


def save(toolkit: Toolkit, model: nn.Module, path: Path) -> None:
    save_state(model, path, modes=toolkit.registry.modes, replace=True)


def who(toolkit: Toolkit, path: Path, models: list[nn.Sequential]) -> int:
    """Restore, and return which of the models was saved; every bit must be one model's."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    fresh = build(7)
    toolkit.restore(fresh, path)
    same = [i for i, model in enumerate(models) if torch.equal(model(x), fresh(x))]
    assert len(same) == 1
    return same[0]


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a copy of this process and return its process id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_after(steps: int) -> Callable[..., Any]:
    """Return a trace function that kills the process at the n-th line of what saves."""
    left = [steps]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if Path(frame.f_code.co_filename).name not in STEPS:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.heavy)])
def test_a_save_may_be_killed_at_any_of_its_lines(
    stride: int, way: str, toolkit: Toolkit, models: list[nn.Sequential], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    save(toolkit, models[0], path)
    current, outcomes, step = 0, [], 0
    while True:

        def work(step: int = step, following: int = 1 - current) -> None:
            sys.settrace(dying_after(step))
            save(toolkit, models[following], path)

        ended = code_of(forked(work))
        assert ended in (0, -signal.SIGKILL)
        if not path.exists():  # only where directories cannot be exchanged
            assert way == "rename"
            aside = left_aside(path)
            assert aside is not None
            assert who(toolkit, aside, models) == current
            save(toolkit, models[current], path)
        found = who(toolkit, path, models)
        assert found in (current, 1 - current)
        outcomes.append(found != current)
        current = found
        if ended == 0:
            break
        step += stride
    assert outcomes.count(False) > 10
    assert outcomes.count(True) > 3, "killed after the exchange, the new one is there"
    save(toolkit, models[0], path)
    assert beside(path) == [], "what killed saves left is removed by the next"


def test_a_save_may_be_killed_at_random(
    toolkit: Toolkit, models: list[nn.Sequential], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    save(toolkit, models[0], path)

    def work(first: int) -> None:
        for number in range(first, 10_000):
            save(toolkit, models[number % 2], path)

    begun = time.perf_counter()
    assert code_of(forked(lambda: save(toolkit, models[0], path))) == 0
    one = time.perf_counter() - begun
    chance, current, changed = random.Random(0), 0, 0
    for _ in range(50):
        child = forked(lambda first=1 - current: work(first))
        time.sleep(chance.uniform(0, 2 * one))
        os.kill(child, signal.SIGKILL)
        assert code_of(child) == -signal.SIGKILL
        found = who(toolkit, path, models)
        changed += found != current
        current = found
    assert changed > 0
    save(toolkit, models[0], path)
    assert beside(path) == []


def test_readers_see_a_whole_state_while_two_processes_replace_it(
    toolkit: Toolkit, models: list[nn.Sequential], tmp_path: Path
) -> None:
    """A reader may come between two files, and is then told so; it never mixes two states."""
    from bittern.errors import CheckpointError

    path = tmp_path / "state"
    save(toolkit, models[0], path)

    def work() -> None:
        while True:
            for model in models:
                save(toolkit, model, path)

    children = [forked(work), forked(work)]
    try:
        read = 0
        for _ in range(150):
            try:
                who(toolkit, path, models)
                read += 1
            except CheckpointError:
                pass
        assert all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in children), "they go on"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            code_of(child)
    assert read > 10
    who(toolkit, path, models)


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_a_disk_that_is_full_leaves_the_old_state(
    limit: int, toolkit: Toolkit, models: list[nn.Sequential], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    save(toolkit, models[0], path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match="the disk is full"):
            save(toolkit, models[1], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert who(toolkit, path, models) == 0
    assert beside(path) == []


def test_a_disk_that_fails_to_sync_leaves_the_old_state(
    toolkit: Toolkit,
    models: list[nn.Sequential],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "state"
    save(toolkit, models[0], path)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        save(toolkit, models[1], path)
    assert who(toolkit, path, models) == 0
    assert beside(path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_leaves_the_old_state(
    toolkit: Toolkit, models: list[nn.Sequential], tmp_path: Path
) -> None:
    path = tmp_path / "closed" / "state"
    save(toolkit, models[0], path)
    path.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="no permission"):
            save(toolkit, models[1], path)
    finally:
        path.parent.chmod(0o700)
    assert who(toolkit, path, models) == 0


# --- what may be replaced -------------------------------------------------------------------------


def test_only_a_state_and_nothing_else_is_replaced(
    toolkit: Toolkit, models: list[nn.Sequential], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    save(toolkit, models[0], path)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds more than what would take its place"):
        save(toolkit, models[1], path)
    assert (path / "notes.txt").read_text() == "mine"
    (path / "notes.txt").unlink()
    (path / "manifest.json").write_text('{"schema": 3}')
    assert not saving.replaceable(path)


def test_without_being_asked_nothing_is_replaced(
    toolkit: Toolkit, models: list[nn.Sequential], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    toolkit.save(models[0], path)
    with pytest.raises(OutputError, match="is not empty"):
        toolkit.save(models[1], path)
    assert who(toolkit, path, models) == 0
