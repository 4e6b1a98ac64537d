"""A sample of the tokens that go through a quantizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from bittern.calibration.reduce import agree, reduce_sum
from bittern.nn import Experts
from bittern.nn.observer import SharedInputs

__all__ = ["TokenSample", "gathered"]


class TokenSample:
    """Keeps every n-th token, with n such that there are enough of them, but not too many.

    Which tokens are kept depends on how many there were and not on how they came in batches.

    Args:
        shared: Shares what is kept of one tensor.
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
        kind = ("tokens", offset, self._stride)  # q, k and v keep the same ones
        self._kept.append(self._shared.once(x, kind, rows[offset :: self._stride].clone))
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


def gathered(samples: Mapping[str, TokenSample]) -> dict[str, Tensor | None]:
    """Return the tokens that all ranks kept, the same on every rank.

    Args:
        samples: The samples of this rank, by name; the other ranks have those of the same names.
    """
    own = {name: sample.rows() for name, sample in samples.items()}
    everyone = agree(payload={n: None if r is None else tuple(r.shape) for n, r in own.items()})
    if len(everyone) == 1:
        return own
    rank = dist.get_rank()
    padded: dict[str, Tensor] = {}
    for name, rows in own.items():
        shapes = [theirs[name] for theirs in everyone]
        counts = [0 if shape is None else shape[0] for shape in shapes]
        width = next((shape[1] for shape in shapes if shape is not None), None)
        if width is not None:
            start = sum(counts[:rank])
            padded[name] = torch.zeros(
                sum(counts), width, device=None if rows is None else rows.device
            )
            if rows is not None:
                padded[name][start : start + len(rows)] = rows
    found = reduce_sum(padded)
    return {name: found.get(name) for name in own}
