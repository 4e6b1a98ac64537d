"""Block by block in two processes: the ranges of one, and a work directory for each rank."""

from __future__ import annotations

from pathlib import Path

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
    blocks = nn.Sequential(Block(), Block(), Block())
    return nn.Sequential(nn.Linear(16, 16), blocks, nn.Linear(16, 4)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=generator) * scale for scale in (1, 5, 2, 3, 4)]


def everything(model: nn.Module) -> dict[str, Tensor]:
    ranges = {f"{n}/{k}": v for n, q in named_quantizers(model) for k, v in q.state().items()}
    return {**{n: p.detach() for n, p in model.named_parameters()}, **ranges}


def quantized(rank: int, world: int, recipe: str) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    model = build()
    bt.quantize(model, recipe, batches()[rank::world], layerwise=True)
    return everything(model)


def test_ranges_are_those_of_one_process() -> None:
    expected = quantized(0, 1, "int8-smoothquant")
    for found in run_distributed(quantized, "int8-smoothquant", timeout=TIMEOUT):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def killed_apart(rank: int, world: int, folder: str) -> list[dict[str, Tensor]]:
    """Lose what one rank has kept last, and go on."""
    results = []
    for _ in range(2):
        model = build()
        bt.quantize(model, "int8-smoothquant", batches()[rank::world], work_dir=folder)
        results.append(everything(model))
        if rank == 1:
            last = max(Path(folder, "rank-1").glob("after-*"))
            last.unlink()
    return results


def test_a_rank_that_is_one_block_behind_is_waited_for(tmp_path: Path) -> None:
    for one, other in run_distributed(killed_apart, str(tmp_path), timeout=TIMEOUT):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
