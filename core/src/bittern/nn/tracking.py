"""What an activation quantizer remembers of a training step: how far its tensors reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from bittern.errors import NumericsError
from bittern.nn.experts import Experts
from bittern.nn.extremes import Extremes
from bittern.nn.transforms import keep_dtype

__all__ = ["NOTHING", "Tracker"]

NOTHING = -1.0


class Tracker(nn.Module):
    """The maximum over everything that came by since `take`, kept on the device.

    A maximum does not change when a tensor comes by twice, as it does where activation
    checkpointing runs a forward pass again, and that of several micro-batches is that of one batch.
    Unlike an observer it lets the quantizer quantize.

    Args:
        extremes: What is kept of a tensor.
        like: A statistic of the same shape, on the device.
    """

    seen: Tensor

    def __init__(self, extremes: Extremes, like: Tensor) -> None:
        super().__init__()
        self._extremes = extremes
        seen = torch.full_like(like, NOTHING, dtype=torch.float32, requires_grad=False)
        self.register_buffer("seen", seen, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, experts: Experts | None = None) -> None:
        """Take in one tensor; an empty one counts for nothing.

        Raises:
            NumericsError: Its ranges have another shape than those of calibration.
        """
        if x.numel() == 0:
            return
        value = self._extremes.of(x.detach(), experts)
        if value.shape != self.seen.shape:
            raise NumericsError(
                f"granularity {self._extremes} gives ranges of shape {tuple(value.shape)}, and "
                f"calibration found {tuple(self.seen.shape)}",
                hint="train on inputs of one shape, or use granularity: tensor",
            )
        self.seen.copy_(torch.maximum(self.seen, value))  # in place: compiled code writes here too

    def take(self) -> Tensor:
        """Return the maximum, -1 where nothing came by, and begin anew."""
        found = self.seen.clone()
        self.seen.fill_(NOTHING)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtype(self, before)
        return self
