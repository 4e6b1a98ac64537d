"""Learned rounding in two processes: both follow the gradients of all the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bittern as bt
from bittern.nn import named_quantizers
from bittern.testing import run_distributed

TIMEOUT = 120


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return found


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(16, 4)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=generator) * scale for scale in (1, 5, 2, 3, 4)]


def quantized(rank: int, world: int, algorithm: str) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    model = build()
    weight = {"format": "int4", "granularity": "group", "size": 16}
    recipe: dict[str, Any] = {
        "rules": [{"match": {"class": "Linear"}, "weight": weight}],
        "algorithm": [{"name": algorithm, "options": {"steps": 10, "norms": True}}],
    }
    bt.quantize(model, recipe, batches()[rank::world])
    ranges = {f"{n}/{k}": v for n, q in named_quantizers(model) for k, v in q.state().items()}
    return {**{n: p.detach() for n, p in model.named_parameters()}, **ranges}


def test_all_ranks_learn_the_same_rounding_of_a_block() -> None:
    one, other = run_distributed(quantized, "learn-rounding", timeout=TIMEOUT)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    alone = quantized(0, 2, "learn-rounding")
    assert not torch.equal(one["0.0.up.weight"], alone["0.0.up.weight"])


def test_all_ranks_learn_the_same_rounding_of_a_model() -> None:
    one, other = run_distributed(quantized, "distill-rounding", timeout=TIMEOUT)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
