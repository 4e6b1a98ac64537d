"""Running means of two ranks (gloo) are those of one process with all their data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bittern as bt
from bittern.nn import named_quantizers
from bittern.testing import run_distributed
from bittern.training import train_ranges

STEPS, TIMEOUT = 2, 120


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    bt.quantize(model, "int8", data=batches()[:1])
    return model.train()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=generator) * scale for scale in (1, 5, 2, 3)]


def train(model: nn.Sequential, data: list[torch.Tensor], *, ddp: bool) -> None:
    """Two steps, each of as many batches as there are for one."""
    ranges = train_ranges(
        model, weights="follow", activations="ema", decay=0.5, ranges={"0.weight": "learned"}
    )
    whole: nn.Module = DistributedDataParallel(model) if ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    per_step = len(data) // STEPS
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for x in data[step * per_step : (step + 1) * per_step]:
            loss = loss + whole(x).square().mean() / per_step
        loss.backward()
        optimizer.step()
        ranges.step()
    ranges.finish()


def ranges_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: q.amax for name, q in named_quantizers(model) if q.amax is not None}


def trained(rank: int, world: int) -> dict[str, torch.Tensor]:
    model = build()
    train(model, batches()[rank::world], ddp=True)
    return ranges_of(model)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, torch.Tensor]]:
    """The ranges of two ranks."""
    return run_distributed(trained, timeout=TIMEOUT)


def test_two_ranks_have_the_ranges_of_one_process(ranks: list[dict[str, torch.Tensor]]) -> None:
    model = build()
    before = {name: value.clone() for name, value in ranges_of(model).items()}
    train(model, batches(), ddp=False)
    expected = ranges_of(model)
    assert all(not torch.equal(value, before[name]) for name, value in expected.items())
    for found in ranks:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_the_ranks_agree_to_the_bit(ranks: list[dict[str, torch.Tensor]]) -> None:
    first, second = ranks
    assert all(torch.equal(second[name], value) for name, value in first.items())
