"""Fresh processes: results come back, errors and hangs do not stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from bittern.testing import ChildFailedError, assert_bit_identical, run_distributed, run_fresh


def add_up(rank: int, world: int, values: torch.Tensor, names: dict[str, list[str]]) -> object:
    total = values * (rank + 1)
    dist.all_reduce(total)
    return {"rank": rank, "world": world, "total": total, "names": (names, None)}


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise RuntimeError("no luck on this rank")
    dist.barrier()


def hang(rank: int, world: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def where(value: float) -> list[object]:
    return [os.getpid(), torch.get_num_threads(), value]


def die() -> None:
    os._exit(7)


def test_results_come_back_by_rank() -> None:
    values = torch.tensor([1.0, 2.5])
    results = run_distributed(add_up, values, {"a": ["b"]}, world=2)

    for rank, result in enumerate(results):
        expected = {
            "rank": rank,
            "world": 2,
            "total": values * 3,
            "names": ({"a": ["b"]}, None),
        }
        assert_bit_identical(expected, result)


def test_an_error_of_one_rank_ends_all_and_shows_its_traceback() -> None:
    with pytest.raises(ChildFailedError, match="no luck on this rank") as caught:
        run_distributed(fail_on_one, world=2)

    assert "rank 1 of 2" in str(caught.value)
    assert "fail_on_one" in str(caught.value)


def test_a_hang_is_killed(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="rank 0, 1 of 2 did not end within 5 seconds"):
        run_distributed(hang, str(tmp_path), world=2, timeout=5)

    for file in tmp_path.iterdir():  # those that came so far within the limit
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_fresh_process_is_another_with_as_many_threads() -> None:
    pid, threads, value = run_fresh(where, 2.5)

    assert pid != os.getpid()
    assert threads == torch.get_num_threads()
    assert value == 2.5


def test_a_process_that_dies_without_a_word_is_an_error() -> None:
    with pytest.raises(ChildFailedError, match="exit code 7"):
        run_fresh(die)


def test_a_function_that_nobody_else_can_find_is_refused() -> None:
    def nested() -> None: ...

    with pytest.raises(TypeError, match="top of an importable module"):
        run_fresh(nested)
