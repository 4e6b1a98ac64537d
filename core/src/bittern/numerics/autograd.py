"""Straight-through gradients: 1 where ``|x| <= amax``, 0 beyond (design: numerics.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bittern.numerics.layout import as_blocks, expand_scale, from_blocks
from bittern.records import QuantizerSpec

__all__ = ["straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        amax: Tensor | None,
        spec: QuantizerSpec,
        apply: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return apply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, amax, spec, _ = inputs  # apart from forward, as torch.func.grad needs it
        if amax is not None:
            blocks = as_blocks(x, spec.granularity)
            inside = blocks.float().abs() <= expand_scale(amax, spec.granularity)
            ctx.save_for_backward(from_blocks(inside, spec.granularity, x.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        saved = ctx.saved_tensors
        return (grad * saved[0] if saved else grad), None, None, None


def straight_through(
    x: Tensor, amax: Tensor | None, spec: QuantizerSpec, apply: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a rounding function with the straight-through gradient.

    Args:
        x: The input.
        amax: Clipping range in the granularity's shape; ``None`` passes every gradient through
            (dynamic scales: nothing is beyond their range).
        spec: Format and granularity.
        apply: The rounding.
    """
    result: Tensor = _StraightThrough.apply(x, amax, spec, apply)  # type: ignore[no-untyped-call]
    return result
