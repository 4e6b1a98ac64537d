"""A sample of the tokens that go through a quantizer."""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.nn import Experts
from bittern.nn.observer import SharedInputs

__all__ = ["TokenSample"]


class TokenSample:
    """Keeps every n-th token, with n such that there are enough of them, but not too many.

    Which tokens are kept depends on how many there were and not on how they came in batches.

    Args:
        shared: Says which batch runs.
        limit: How many tokens are kept at least, if there are so many; fewer than twice as many.
    """

    def __init__(self, shared: SharedInputs, *, limit: int) -> None:
        self._shared = shared
        self._limit = limit
        self._stride = 1
        self._count = 0
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def observe(self, x: Tensor, experts: Experts | None = None) -> None:
        """Take in one tensor, ``(..., features)``."""
        rows = x.detach().reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
        offset = -self._count % self._stride
        self._count += len(rows)
        self._kept.append(rows[offset :: self._stride].clone())
        while -(-self._count // self._stride) >= 2 * self._limit:
            kept = torch.cat(self._kept)
            self._stride *= 2
            self._kept = [kept[::2].clone()]

    def rows(self) -> Tensor | None:
        """Return the tokens, float32, ``(tokens, features)``; ``None`` if there were none."""
        if not self._kept or not self._count:
            return None
        return torch.cat(self._kept).float()

    def first_bad_batch(self) -> int | None:
        """Values are not looked at."""
        return None
