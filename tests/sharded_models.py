"""Models, data and sharding that the tests of FSDP2 share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

__all__ = ["Model", "batches", "build", "shard"]


class Model(nn.Module):
    """An embedding, two layers of two Linears, a head that is tied to the embedding.

    5 rows do not divide by 2 ranks: the shards are uneven.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(37, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 16)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits, ``(batch, tokens, 37)``."""
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        found: torch.Tensor = self.head(x)
        return found


def build(seed: int = 0) -> Model:
    """Return a fresh model."""
    return Model(seed).eval()


def batches() -> list[torch.Tensor]:
    """Return four batches of tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 37, (2, 6), generator=generator) for _ in range(4)]


def shard(model: Model, world: int, **options: Any) -> Model:
    """Shard a model over all ranks, its layers one by one and then the rest, as FSDP2 is used."""
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model
