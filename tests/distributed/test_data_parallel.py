"""Calibration under torch.distributed (gloo, two processes) equals one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

import bittern as bt
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=generator) * scale for scale in (1, 5, 2, 3)]


def ranges(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: q.amax for name, q in named_quantizers(model) if q.amax is not None}


def worker(rank: int, folder: str, *, poison: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = batches()[rank::2]
    if poison and rank == 1:
        data[1][0, 0] = float("nan")
    model = build()
    try:
        bt.quantize(model, "int8", data=data)
        torch.save(ranges(model), f"{folder}/{rank}.pt")
    except CalibrationError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    finally:
        dist.destroy_process_group()


def run_two(folder: Path, *, poison: bool) -> None:
    """Run this file twice, as rank 0 and 1."""
    command = [sys.executable, __file__, str(folder), str(int(poison))]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def test_ranges_of_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    run_two(tmp_path, poison=False)
    model = build()
    bt.quantize(model, "int8", data=batches())
    expected = ranges(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_meets_nan_stops_every_rank(rank: int, tmp_path: Path) -> None:
    run_two(tmp_path, poison=True)
    message = (tmp_path / f"{rank}.txt").read_text()
    assert "NaN or Inf in batch 1" in message


if __name__ == "__main__":
    worker(int(sys.argv[3]), sys.argv[1], poison=bool(int(sys.argv[2])))
