"""Calibration under torch.distributed (gloo, two processes) equals one process."""

from __future__ import annotations

import torch
from torch import nn

import bittern as bt
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers
from bittern.testing import run_distributed

TIMEOUT = 120


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=generator) * scale for scale in (1, 5, 2, 3)]


def ranges(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: q.amax for name, q in named_quantizers(model) if q.amax is not None}


def found(rank: int, world: int, poison: bool) -> dict[str, torch.Tensor] | str:
    """Return the ranges of a rank, or what it failed with."""
    data = batches()[rank::world]
    if poison and rank == 1:
        data[1][0, 0] = float("nan")
    model = build()
    try:
        bt.quantize(model, "int8", data=data)
    except CalibrationError as error:
        return str(error)
    return ranges(model)


def test_ranges_of_two_ranks_are_those_of_one_process() -> None:
    model = build()
    bt.quantize(model, "int8", data=batches())
    expected = ranges(model)
    for result in run_distributed(found, False, timeout=TIMEOUT):
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_a_rank_that_meets_nan_stops_every_rank() -> None:
    for message in run_distributed(found, True, timeout=TIMEOUT):
        assert "NaN or Inf in batch 1" in message
