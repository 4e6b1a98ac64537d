"""A search on two processes finds what one process finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.errors import CalibrationError
from bittern.search import SearchResult
from bittern.testing import run_distributed

TIMEOUT = 120


def search(data: list[Tensor], *, fail: bool = False) -> SearchResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()).eval()

    def loss(output: Tensor, batch: Any) -> Tensor:
        if fail:
            raise ValueError("this rank's loss is broken")
        return output.square().sum()

    options: Any = {"bits": 9.5, "points": 3, "loss": loss, "toolkit": bt.Toolkit(block=["*"])}
    return bt.auto_quantize(model, ["int4", "int8"], data, **options)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=generator) * scale for scale in (1, 5, 2, 3, 4)]


def found(rank: int, world: int, fail: bool) -> dict[str, Any]:
    """Return what a rank finds, or what it failed with."""
    try:
        return search(batches()[rank::world], fail=fail and rank == 1).to_dict()
    except CalibrationError as error:
        return {"error": str(error)}


def test_two_ranks_agree_and_find_what_one_process_finds() -> None:
    first, second = run_distributed(found, False, timeout=TIMEOUT)
    alone = search(batches())
    assert first == second
    assert first["recipe"]["rules"] == alone.recipe()["rules"]
    for ours, theirs in zip(first["groups"], alone.decisions, strict=True):
        for option, one in zip(ours["options"], theirs.options, strict=True):
            assert option["score"] == pytest.approx(one.score, rel=1e-5)


def test_what_fails_on_one_rank_ends_all() -> None:
    for result in run_distributed(found, True, timeout=TIMEOUT):
        assert "this rank's loss is broken" in result["error"]
