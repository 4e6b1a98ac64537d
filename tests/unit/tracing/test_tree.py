"""The trace as a tree of modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bittern.toolkit import Toolkit


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)
        )
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x).unflatten(-1, (2, 4)).flatten(-2)
        return self.head(x)


def test_dimensions_are_written_as_what_they_are_made_of(toolkit: Toolkit) -> None:
    tree = toolkit.trace(Tied(), torch.arange(6)[None]).to_tree().splitlines()
    assert tree[0] == "Tied"
    assert "  embed: Embedding  weight [10!, 2 x 4]" in tree
    assert "      0: Linear  weight [12, 2 x 4]  bias [12]" in tree


def test_equal_blocks_take_one_line(toolkit: Toolkit) -> None:
    tree = toolkit.trace(Tied(), torch.arange(6)[None]).to_tree()
    assert tree.count("Sequential") == 1
    assert "    {0..2}: Sequential" in tree.splitlines()


def test_tied_and_unread_tensors_say_so(toolkit: Toolkit) -> None:
    tree = toolkit.trace(Tied(), torch.arange(6)[None]).to_tree().splitlines()
    assert "  head: Linear  weight [10!, 2 x 4] = embed.weight" in tree
    assert "  idle: Linear  weight (not read)  bias (not read)" in tree
