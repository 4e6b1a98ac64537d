"""Ranges of activations that are a running mean of the largest magnitudes of batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bittern.calibration.reduce import reduce_max
from bittern.nn import TensorQuantizer
from bittern.nn.tracking import NOTHING, Tracker

__all__ = ["RunningMeans"]


class RunningMeans:
    """Exponential means over training steps, which start at the calibrated ranges.

    A step's statistic is the maximum over everything that a quantizer saw in training mode since
    the step before: all micro-batches, on all ranks. It is the one of a single large batch.

    Args:
        quantizers: Calibrated quantizers of activations.
        decay: How much of the mean a step keeps.
        group: Process group of the ranks; all ranks by default.

    Raises:
        RankError: The ranks hold different modules.
    """

    def __init__(self, quantizers: Iterable[TensorQuantizer], decay: float, group: Any) -> None:
        self._decay = decay
        self._group = group
        self._pairs = [(q, Tracker(q.extremes, _statistic(q))) for q in quantizers]
        if group is None and self._pairs:  # once: do all ranks hold the same?
            reduce_max({q.name: tracker.seen for q, tracker in self._pairs}, None)
        for quantizer, tracker in self._pairs:
            quantizer.tracker = tracker

    @torch.no_grad()
    def step(self) -> None:
        """Take what was seen into the means; nothing here waits for the device."""
        seen = [_usable(quantizer, tracker.take()) for quantizer, tracker in self._pairs]
        for (quantizer, _), new in zip(self._pairs, _over_ranks(seen, self._group), strict=True):
            old = _statistic(quantizer)
            mean = torch.where(new >= 0, self._decay * old + (1 - self._decay) * new, old)
            quantizer.set_range(quantizer.extremes.range_of(mean), check=False)

    def stop(self) -> None:
        """Collect nothing any more."""
        for quantizer, _ in self._pairs:
            quantizer.tracker = None


def _statistic(quantizer: TensorQuantizer) -> Tensor:
    """Return the statistic that stands for the present range, as `Extremes.range_of` takes it."""
    values = quantizer.range
    assert values is not None, quantizer.name
    if not quantizer.extremes.both:
        return values.amax
    low = torch.zeros_like(values.amax) if values.amin is None else -values.amin
    return torch.stack((values.amax, low))


def _usable(quantizer: TensorQuantizer, seen: Tensor) -> Tensor:
    """Return what was seen, -1 where that is nothing, or NaN or Inf.

    A step that overflows in half precision is one that the optimizer skips, too.
    """
    usable = seen.isfinite()
    if quantizer.per_expert:  # an expert without tokens
        usable &= seen > 0
    return torch.where(usable, seen, NOTHING)


def _over_ranks(seen: list[Tensor], group: Any) -> list[Tensor]:
    """Return the maxima over all ranks, in one message."""
    if not seen or not (dist.is_available() and dist.is_initialized()):
        return seen
    if dist.get_world_size(group) == 1:
        return seen
    flat = torch.cat([value.flatten().to(seen[0].device) for value in seen])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
    parts = torch.split(flat, [value.numel() for value in seen])
    return [p.reshape(v.shape).to(v.device) for p, v in zip(parts, seen, strict=True)]
