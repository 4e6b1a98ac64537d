"""Gradients of rounding: straight-through, and learned ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bittern.numerics.codec import Scales, codec_of
from bittern.numerics.layout import as_blocks, expand_scale, from_blocks
from bittern.numerics.quantize import fake_quantize
from bittern.numerics.ranges import Range, scales_for
from bittern.records import Granularity, QuantizerSpec

__all__ = ["learned_range", "straight_through"]


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True  # per-sample gradients, jacobians

    @staticmethod
    def forward(
        x: Tensor,
        values: Range | None,
        granularity: Granularity,
        apply: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return apply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, granularity, _ = inputs  # apart from forward, as torch.func.grad needs it
        if values is not None:
            blocks = as_blocks(x, granularity).float()
            high = expand_scale(values.amax, granularity)
            if values.amin is None:
                inside = blocks.abs() <= high
            else:
                inside = (blocks <= high) & (blocks >= expand_scale(values.amin, granularity))
            ctx.save_for_backward(from_blocks(inside, granularity, x.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        saved = ctx.saved_tensors
        return (grad * saved[0] if saved else grad), None, None, None


def straight_through(
    x: Tensor, values: Range | None, granularity: Granularity, apply: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a rounding function with the straight-through gradient: 1 inside the range, 0 beyond.

    Args:
        x: The input.
        values: Clipping range in the granularity's shape; ``None`` passes every gradient through
            (dynamic scales: nothing is beyond their range).
        granularity: Which elements share a range.
        apply: The rounding.
    """
    result: Tensor = _StraightThrough.apply(x, values, granularity, apply)  # type: ignore[no-untyped-call]
    return result


def learned_range(x: Tensor, amax: Tensor, spec: QuantizerSpec) -> Tensor:
    """Fake-quantize with gradients for the range too: learned step size quantization.

    With ``v = x / s`` and the grid's ends ``n, p``: ``dy/dx`` is 1 for ``n <= v <= p`` and 0
    beyond; ``dy/ds`` is ``Q(v) - v`` inside, and ``n`` or ``p`` beyond (LSQ, arXiv:1902.08153,
    equations 3 and 5). The values are exactly those of `fake_quantize`.

    Args:
        x: The input.
        amax: Range, float32, in the granularity's shape; it gets the gradient. Training may take
            it below 0: its magnitude counts.
        spec: A symmetric format of one level.
    """
    codec, amax = codec_of(spec.format), amax.abs()
    step = torch.where(amax == 0, torch.ones_like(amax), amax / codec.max_value)
    step = expand_scale(step, spec.granularity)
    values = as_blocks(x.float(), spec.granularity) / step
    inside = values.clamp(codec.min_value, codec.max_value)
    rounded = codec.round_(values.detach().clone())
    smooth = (inside + (rounded - inside).detach()) * step
    smooth = from_blocks(smooth, spec.granularity, x.shape).to(x.dtype)
    with torch.no_grad():
        scales: Scales = scales_for(Range(amax), spec)
        exact = fake_quantize(x, spec, scales)
    return exact + (smooth - smooth.detach())  # the gradient of one, the bits of the other
