"""A small encoder of the framework's own layers."""

from __future__ import annotations

from torch import Tensor, nn

from heron_framework.attention import Attention
from heron_framework.layers import Linear


class Block(nn.Module):
    """Attention, then two linear layers; the input is added to what each makes of it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, 2 * width, activation="swish")
        self.down = Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)``."""
        x = x + self.attention(x)
        return x + self.down(self.up(self.norm(x)))


class Encoder(nn.Module):
    """Several blocks."""

    def __init__(self, *, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)``."""
        for block in self.blocks:
            x = block(x)
        return x
