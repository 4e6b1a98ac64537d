"""A weight whose rounding is learned: an offset per element, a clip per scale.

A weight ``w`` under the step ``s`` is rounded to ``s * Q(w / s + g * v)``: ``v``, from -1/2 to 1/2,
chooses between the two neighbors on the grid, which are ``g`` apart, and the range that ``s``
follows from is a share ``c`` of what it was (Cheng et al., "Optimize Weight Rounding via Signed
Gradient Descent", arXiv:2309.05516, equations 3 to 5). Gradients go straight through ``Q``: with
``q = Q(u)``, ``u = w / s + g * v``, ``dy/dv`` is ``s * g`` where ``u`` lies on the grid, and 0
beyond; ``dy/ds`` is ``q - w / s`` there, and ``q`` beyond. The grid is the codec's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bittern.numerics import Codec, Range, Scales, codec_of, fake_quantize, scales_for
from bittern.numerics.layout import as_blocks, expand_scale, from_blocks
from bittern.records import QuantizerSpec

__all__ = ["LearnedWeight", "gaps"]

_PROBES = 1 << 13
_OCTAVES = 40  # below the largest number of a grid; what is smaller counts as 0


class LearnedWeight:
    """The parameters of the rounding of one weight, and what it is rounded to by them.

    Args:
        weight: The weight, of any floating dtype.
        values: Its range.
        spec: Format and granularity; static.
        start: What is rounded where the offsets are 0, in the shape of the weight; the weight by
            default. A result of GPTQ before it was rounded serves, too.

    Attributes:
        offset: ``v``, float32, in the layout of `bittern.numerics.layout.as_blocks`.
        clips: ``c``, the shares of the largest value, and of the smallest one in asymmetric
            formats, float32, in the shape of the range.
    """

    def __init__(
        self, weight: Tensor, values: Range, spec: QuantizerSpec, *, start: Tensor | None = None
    ) -> None:
        self.spec = spec
        self._codec = codec_of(spec.format)
        self._values = values
        self._shape, self._dtype = weight.shape, weight.dtype
        source = (weight if start is None else start).detach().float()
        blocks = as_blocks(source, spec.granularity).contiguous()
        self.offset = torch.zeros_like(blocks).requires_grad_()
        ends = 1 if values.amin is None else 2
        self.clips = [torch.ones_like(values.amax).requires_grad_() for _ in range(ends)]
        position = blocks / expand_scale(self.scales().step, spec.granularity)
        self._source = _Source(blocks, gaps(self._codec, position), self._codec)

    def range(self) -> Range:
        """Return the range as it is clipped now."""
        with torch.no_grad():
            values = self._values
            amin = None if values.amin is None else values.amin * self.clips[1]
            return replace(values, amax=values.amax * self.clips[0], amin=amin)

    def scales(self) -> Scales:
        """Return the scales that follow from the range, by the format's rule."""
        with torch.no_grad():
            return scales_for(self.range(), self.spec)

    def __call__(self) -> Tensor:
        """Return the rounded weight, float32, with gradients for offset and clips."""
        scales = self.scales()
        step, zero = self._soft(scales)
        wide = partial(expand_scale, granularity=self.spec.granularity)
        rounded = _Rounding.apply(  # type: ignore[no-untyped-call]
            self._source, self.offset, wide(step), None if zero is None else wide(zero)
        )
        return from_blocks(rounded, self.spec.granularity, self._shape)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the rounded weight in its dtype; `fake_quantize` with `scales` leaves it as it is.

        What the straight-through function returns is off by the last bit now and then, and so is a
        number that the dtype rounds: both land on the same point of the grid when rounded again.
        """
        found = fake_quantize(self().to(self._dtype), self.spec, self.scales())
        return fake_quantize(found, self.spec, self.scales())

    @torch.no_grad()
    def target(self) -> Tensor:
        """Return what is rounded, in the dtype of the weight: rounding it to nearest gives `hard`.

        But for numbers that lie as close to the middle between two as the dtype can tell.
        """
        step = expand_scale(self.scales().step, self.spec.granularity)
        moved = self._source.blocks + self.offset * self._source.gap * step
        return from_blocks(moved, self.spec.granularity, self._shape).to(self._dtype)

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to rounding to nearest in the whole range."""
        self.offset.zero_()
        for clip in self.clips:
            clip.fill_(1.0)

    @torch.no_grad()
    def bound(self, *, least: float = 0.5, most: float = 1.5) -> None:
        """Bring offsets and clips back to where they may be, after a step.

        Args:
            least: Smallest clip.
            most: Largest clip.
        """
        self.offset.clamp_(-0.5, 0.5)
        for clip in self.clips:
            clip.clamp_(least, most)

    def _soft(self, scales: Scales) -> tuple[Tensor, Tensor | None]:
        """Return step and zero point, with the gradients they would have if they were not rounded.

        A step is proportional to its range, so ``ds/dc = s / c``; between two ends it is their
        distance over the number of steps, and the zero point ``min - low / s``.
        """
        values, codec = self._values, self._codec
        if values.amin is None or scales.zero_point is None:
            share = scales.step / self.clips[0].detach()
            return _with_slope(scales.step, share * self.clips[0]), None
        high, low = values.amax * self.clips[0], values.amin * self.clips[1]
        step = _with_slope(scales.step, (high - low) / (codec.max_value - codec.min_value))
        return step, _with_slope(scales.zero_point, codec.min_value - low / step)


@dataclass(frozen=True, eq=False)
class _Source:
    """What is rounded: a weight as blocks, the gaps of the grid at its numbers, the grid."""

    blocks: Tensor
    gap: Tensor | float
    codec: Codec


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: _Source, offset: Tensor, step: Tensor, zero: Tensor | None
    ) -> Tensor:
        codec, gap = source.codec, source.gap
        position = source.blocks / step
        if isinstance(gap, Tensor):
            moved = torch.addcmul(position, offset, gap)
        else:
            moved = torch.add(position, offset, alpha=gap)
        if zero is not None:
            moved.round_().add_(zero)
        inside = (moved >= codec.min_value) & (moved <= codec.max_value)
        code = codec.round_(moved)
        if zero is not None:
            code.sub_(zero)
        ctx.save_for_backward(inside, position, code, step)
        ctx.gap, ctx.zero = gap, zero is not None
        return code * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inside, position, code, step = ctx.saved_tensors
        passed = grad * inside
        by_step = by_zero = None
        if ctx.needs_input_grad[2]:
            slope = (grad * code).addcmul_(passed, position, value=-1)
            by_step = slope.sum_to_size(step.shape)
        if ctx.zero and ctx.needs_input_grad[3]:
            by_zero = (passed - grad).mul_(step).sum_to_size(step.shape)
        return None, passed.mul_(step).mul_(ctx.gap), by_step, by_zero


def gaps(codec: Codec, values: Tensor) -> Tensor | float:
    """Return how far apart the neighbors of each value are on a codec's grid.

    Args:
        codec: The codec.
        values: Numbers in units of the step, float32.

    Returns:
        Float32, like ``values``; a number where all neighbors are equally far apart.
    """
    grid = _grid(codec, values.device)
    apart = grid.diff()
    if bool((apart == apart[0]).all()):
        return float(apart[0])
    index = torch.bucketize(values, grid).clamp_(1, len(grid) - 1)
    return apart[index - 1]


def _grid(codec: Codec, device: torch.device) -> Tensor:
    """Return the numbers of a codec's grid, found by rounding many numbers."""
    low, high = codec.min_value, codec.max_value
    even = torch.linspace(low, high, _PROBES)
    small = torch.exp2(torch.linspace(-_OCTAVES, 0, _PROBES)) * high
    probes = torch.cat([even, small, -small]).clamp_(low, high)
    grid: Tensor = torch.unique(codec.round_(probes))
    return grid.to(device)


def _with_slope(exact: Tensor, soft: Tensor) -> Tensor:
    """Return the first, with the gradient of the second."""
    return exact.detach() + (soft - soft.detach())
