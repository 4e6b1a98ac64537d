"""A search on two processes finds what one process finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import bittern as bt
from bittern.errors import CalibrationError
from bittern.search import SearchResult


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


def worker(rank: int, folder: str, *, fail: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = search(batches()[rank::2], fail=fail and rank == 1)
        found.to_json(f"{folder}/{rank}.json")
    except CalibrationError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    finally:
        dist.destroy_process_group()


def run_two(folder: Path, *, fail: bool) -> None:
    command = [sys.executable, __file__, str(folder), str(int(fail))]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def test_two_ranks_agree_and_find_what_one_process_finds(tmp_path: Path) -> None:
    run_two(tmp_path, fail=False)
    alone = search(batches())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["recipe"]["rules"] == alone.recipe()["rules"]
    for ours, theirs in zip(first["groups"], alone.decisions, strict=True):
        for option, one in zip(ours["options"], theirs.options, strict=True):
            assert option["score"] == pytest.approx(one.score, rel=1e-5)


def test_what_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    run_two(tmp_path, fail=True)
    for rank in (0, 1):
        assert "this rank's loss is broken" in (tmp_path / f"{rank}.txt").read_text()


if __name__ == "__main__":
    worker(int(sys.argv[3]), sys.argv[1], fail=bool(int(sys.argv[2])))
