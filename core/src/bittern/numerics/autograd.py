"""Gradients of rounding: straight-through, and learned ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bittern.numerics.codec import Scales, codec_of, linear_scale
from bittern.numerics.layout import as_blocks, expand_scale, from_blocks
from bittern.numerics.quantize import fake_quantize
from bittern.numerics.ranges import Range, scales_for
from bittern.records import Granularity, QuantizerSpec

__all__ = ["is_learnable", "learned_range", "straight_through"]


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
            ctx.save_for_backward(_inside(x, values, granularity))

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
    if not torch.compiler.is_compiling():  # a function of its own keeps one byte per element
        result: Tensor = _StraightThrough.apply(x, values, granularity, apply)  # type: ignore[no-untyped-call]
        return result
    # Compilers differentiate plain operations in every version, and fuse them.
    with torch.no_grad():
        exact = apply(x)
        inside = None if values is None else _inside(x, values, granularity)
    passed = x if inside is None else torch.where(inside, x, 0.0)
    return exact + _slope_only(passed)


def learned_range(x: Tensor, amax: Tensor, spec: QuantizerSpec) -> Tensor:
    """Fake-quantize with gradients for the range too: learned step size quantization (LSQ).

    With the step ``s = amax / p``, ``v = x / s`` and the grid's ends ``n, p``: ``dy/dx`` is 1 for
    ``n <= v <= p`` and 0 beyond; ``dy/ds`` is ``Q(v) - v`` inside, and ``n`` or ``p`` beyond
    (arXiv:1902.08153, equations 3 and 5). So ``dy/damax`` is ``(y - x) / amax`` inside and
    ``y / amax`` beyond.

    The gradient of the range is scaled such that gradient descent moves the step as it does in the
    paper, where the step is the parameter and its gradient is divided by ``sqrt(N * Q)`` (section
    2.2), with ``N`` elements under one step and ``Q`` codes above zero: by ``Q^2 / sqrt(N * Q)``.

    The values are exactly those of `fake_quantize`.

    Args:
        x: The input.
        amax: Range, float32, in the granularity's shape; it gets the gradient. Training may take
            it below 0: its magnitude counts.
        spec: A format for which `is_learnable` holds.
    """
    codec, granularity, amax = codec_of(spec.format), spec.granularity, amax.abs()
    with torch.no_grad():
        scales: Scales = scales_for(Range(amax), spec)
        exact = fake_quantize(x, spec, scales)
        # from amax, not from the step: the largest element of a tensor lies exactly on the border
        low = codec.min_value / codec.max_value * amax
        inside = _inside(x, Range(amax, amin=low), granularity)
    passed = torch.where(inside, x, 0.0)
    with torch.no_grad():
        divisor = torch.where(amax == 0, torch.ones_like(amax), amax)
        slope = as_blocks(exact.float() - passed.float(), granularity)
        slope = slope / expand_scale(divisor, granularity)
    codes = 2.0 ** (spec.format.bits - codec.signed) - 1
    factor = codes**1.5 / math.sqrt(max(x.numel() / max(amax.numel(), 1), 1.0))
    moved = slope * expand_scale(factor * _slope_only(amax), granularity)
    moved = from_blocks(moved, granularity, x.shape).to(x.dtype)
    return exact + _slope_only(passed) + moved  # the gradients of two, the bits of the first


def is_learnable(spec: QuantizerSpec) -> bool:
    """Whether the scale of a format is ``amax / max_value``, so that a range has a gradient.

    It is not where a scale is rounded itself (a power of two, e4m3), chosen between two, or follows
    from both ends of a range.
    """
    codec = codec_of(spec.format)
    if codec.asymmetric or codec.two_level or codec.fitted:
        return False
    probe = torch.tensor([1.0, 1.3, 1.7])
    return torch.equal(codec.scales(probe).scale, linear_scale(probe, codec.max_value))


def _inside(x: Tensor, values: Range, granularity: Granularity) -> Tensor:
    """Return where ``x`` lies within its range, ends included; compared in float32."""
    blocks = as_blocks(x, granularity).float()
    high = expand_scale(values.amax, granularity)
    if values.amin is None:
        inside = blocks.abs() <= high
    else:
        inside = (blocks <= high) & (blocks >= expand_scale(values.amin, granularity))
    return from_blocks(inside, granularity, x.shape)


def _slope_only(x: Tensor) -> Tensor:
    """Return 0 (NaN for what is not finite), with the gradient of ``x``."""
    return x - x.detach()
