"""The framework's own attention."""

from __future__ import annotations

from torch import Tensor, nn

from heron_framework.layers import Linear

LIMIT = 30.0


class DotProduct(nn.Module):
    """``softmax(q k^T / sqrt(d)) v``; it looks at its data, so no tracer can follow it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return ``(..., tokens, width)``."""
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        if scores.abs().amax() > LIMIT:
            scores = LIMIT * (scores / LIMIT).tanh()
        return scores.softmax(-1) @ value


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.out = Linear(width, width)
        self.core = DotProduct()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)``."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = self.core(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        return self.out(mixed.transpose(1, 2).flatten(2))
