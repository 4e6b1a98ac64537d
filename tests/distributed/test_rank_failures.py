"""A rank that fails stops all of them with its own error; without this they wait for a timeout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bittern as bt
from bittern.calibration.reduce import agree, reduce_max
from bittern.errors import CalibrationError
from bittern.testing import run_distributed

TIMEOUT = 60.0  # a rank that hangs is killed then


def healthy() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 16, generator=generator) for _ in range(3)]


class Broken:
    """Data that can be read a part of the way."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from healthy()
        raise OSError("the disk is gone")


def wrong_shape() -> list[torch.Tensor]:
    return [*healthy(), torch.randn(4, 17)]


SHARES: dict[str, Any] = {
    "raises": Broken,
    "does not fit": wrong_shape,
    "is empty": list,
    "is used up": lambda: iter(()),
}


def quantize(rank: int, world: int, share: str, recipe: str) -> dict[str, Any]:
    """Return what a user of this rank sees when rank 1 has a bad share of the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    data = SHARES[share]() if rank == 1 else healthy()
    try:
        bt.quantize(model, recipe, data=data)
    except CalibrationError as error:
        return {"error": str(error), "cause": type(error.__cause__).__name__}
    return {"error": "", "cause": ""}


@pytest.mark.parametrize(
    ("recipe", "share", "why", "cause"),
    [
        ("int8", "raises", "OSError: the disk is gone", "OSError"),
        ("int8", "does not fit", "RuntimeError", "RuntimeError"),
        ("int8", "is empty", "holds no batch", "DataError"),
        ("int8", "is used up", "holds no batch", "DataError"),
        ("int8-smoothquant", "raises", "OSError: the disk is gone", "OSError"),
        ("int8-smoothquant", "is empty", "holds no batch", "DataError"),
        ("int8-smoothquant", "is used up", "smoothing needs a batch", "CalibrationError"),
    ],
)
def test_every_rank_stops_and_names_the_one_that_failed(
    recipe: str, share: str, why: str, cause: str
) -> None:
    ranks = run_distributed(quantize, share, recipe, timeout=TIMEOUT)

    for found in ranks:
        assert found["error"].startswith("rank 1 of 2 failed: ")
        assert why in found["error"]
    assert [found["cause"] for found in ranks] == ["NoneType", cause]


def fail_after_the_pass(rank: int, world: int, where: str) -> str:
    """Run an algorithm that fails on rank 1 before or after the ranks brought numbers together."""

    def algorithm(model: Any, plan: Any, forward: Any, context: Any) -> None:
        forward()
        if rank == 1 and where == "before":
            raise ZeroDivisionError("nothing to divide by")
        reduce_max({"x": torch.ones(())}, None)
        if rank == 1 and where == "after":
            raise ZeroDivisionError("nothing to divide by")

    import bittern.calibration.max as module

    module.run_max = algorithm
    model = nn.Sequential(nn.Linear(16, 8))
    try:
        bt.quantize(model, "int8", data=healthy())
    except CalibrationError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_algorithm_that_fails_on_one_rank_stops_all(where: str) -> None:
    for text in run_distributed(fail_after_the_pass, where, timeout=TIMEOUT):
        assert text.startswith("rank 1 of 2 failed: ZeroDivisionError: nothing to divide by")


def two_errors(rank: int, world: int) -> str:
    with pytest.raises(CalibrationError) as caught:
        agree(ValueError(f"on rank {rank}"))
    return str(caught.value)


def test_of_several_failures_the_first_is_told_and_the_others_counted() -> None:
    expected = "rank 0 of 2 failed (and so did 1 more): ValueError: on rank 0"
    assert run_distributed(two_errors, timeout=TIMEOUT) == [expected, expected]


def alone(rank: int, world: int) -> int:
    """Rank 0 alone quantizes with a recipe that needs no data; nobody may have to join in."""
    if rank == 0:
        bt.quantize(nn.Sequential(nn.Linear(16, 8)), "int8-weight-only")
    return rank


def test_what_needs_no_data_waits_for_nobody() -> None:
    assert run_distributed(alone, timeout=TIMEOUT) == [0, 1]


def test_one_process_raises_its_own_error() -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        bt.quantize(nn.Sequential(nn.Linear(16, 8)), "int8", data=Broken())
