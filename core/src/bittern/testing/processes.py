"""Runs functions in fresh processes: one, or several that form a process group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from bittern.testing.exchange import read_value, write_value
from bittern.testing.references import reference_to

__all__ = ["ChildFailedError", "run_distributed", "run_fresh"]

GRACE = 2.0  # seconds for the other ranks to end after one has failed


class ChildFailedError(RuntimeError):
    """A child process raised, or died; the message shows its traceback."""


def run_fresh(function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> Any:
    """Call ``function(*args)`` in a fresh process and return its result.

    Args:
        function: A function of module level.
        args: Tensors and plain data, see `bittern.testing.exchange`.
        timeout: Seconds after which the process is killed.

    Raises:
        ChildFailedError: It raised; shows its traceback.
        TimeoutError: It took too long.
        TypeError: The function cannot be found by another process.
    """
    return _run(function, args, world=None, timeout=timeout)[0]


def run_distributed(
    function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 300.0
) -> list[Any]:
    """Call ``function(rank, world, *args)`` in ``world`` processes joined by gloo.

    The processes meet over a file, so no port is taken. Each computes with as many threads as this
    one, so that sums have the same bits.

    Args:
        function: A function of module level.
        args: Tensors and plain data, see `bittern.testing.exchange`.
        world: Number of processes.
        timeout: Seconds after which all of them are killed; a collective that hangs does not.

    Returns:
        The results by rank.

    Raises:
        ChildFailedError: A process raised; shows its traceback.
        TimeoutError: They took too long.
        TypeError: The function cannot be found by another process.
    """
    return _run(function, args, world=world, timeout=timeout)


def _run(
    function: Callable[..., Any], args: Sequence[Any], *, world: int | None, timeout: float
) -> list[Any]:
    job = {
        "function": asdict(reference_to(function)),
        "path": [str(Path(entry).resolve()) for entry in sys.path],
        "threads": torch.get_num_threads(),
        "world": world,
        "timeout": timeout,
    }
    with tempfile.TemporaryDirectory(prefix="bittern-processes-") as name, _logs() as logs:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        write_value(folder, "args", tuple(args))
        children = []
        try:
            for rank in range(world or 1):
                logs.append((folder / f"log-{rank}.txt").open("wb"))
                children.append(_start(folder, rank, logs[-1]))
            _wait(children, time.monotonic() + timeout, folder, timeout)
        finally:
            _kill(children)
        return [read_value(folder, f"result-{rank}") for rank in range(len(children))]


@contextlib.contextmanager
def _logs() -> Any:
    logs: list[IO[bytes]] = []
    try:
        yield logs
    finally:
        for log in logs:
            log.close()


def _start(folder: Path, rank: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    interfaces = {name for _, name in socket.if_nameindex()}
    if "lo" in interfaces:  # a host name that does not resolve must not matter
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "bittern.testing.child", str(folder), str(rank)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # so that its own children can be killed with it
    )


def _wait(
    children: list[subprocess.Popen[bytes]], deadline: float, folder: Path, timeout: float
) -> None:
    while any(child.poll() is None for child in children):
        if any(child.returncode for child in children):
            end = min(deadline, time.monotonic() + GRACE)
            while any(child.poll() is None for child in children) and time.monotonic() < end:
                time.sleep(0.01)
            break
        if time.monotonic() > deadline:
            waiting = [str(rank) for rank, c in enumerate(children) if c.returncode is None]
            raise TimeoutError(
                f"rank {', '.join(waiting)} of {len(children)} did not end within {timeout:g} "
                f"seconds and was killed\n{_last_words(folder, int(waiting[0]))}"
            )
        time.sleep(0.01)
    failed = [rank for rank, child in enumerate(children) if child.returncode]
    if failed:
        rank = min(failed, key=lambda rank: _when(folder, rank))  # the others failed because of it
        raise ChildFailedError(
            f"rank {rank} of {len(children)} failed with exit code {children[rank].returncode}\n"
            f"{_last_words(folder, rank)}"
        )


def _when(folder: Path, rank: int) -> int:
    """Return when a rank failed; a rank that was killed from outside wrote no error."""
    error = folder / f"error-{rank}.txt"
    return error.stat().st_mtime_ns if error.is_file() else 0


def _last_words(folder: Path, rank: int) -> str:
    error = folder / f"error-{rank}.txt"
    if error.is_file():
        return error.read_text(encoding="utf-8")
    log = (folder / f"log-{rank}.txt").read_text(encoding="utf-8", errors="replace")
    return "\n".join(log.splitlines()[-40:])


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    child.kill()
        child.wait()
