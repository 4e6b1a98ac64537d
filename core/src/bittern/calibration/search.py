"""Search for the ranges with the least rounding error, scale by scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bittern.errors import CalibrationError
from bittern.nn import TensorQuantizer
from bittern.numerics import Range, codec_of, fake_quantize, scales_for
from bittern.numerics.layout import as_blocks, as_scale, block_dims
from bittern.records import QuantizerSpec

__all__ = [
    "Error",
    "best_multiple",
    "best_range",
    "cost",
    "multipliers",
    "searchable",
    "squared",
    "summed",
    "times",
    "unit_of",
]

# What rounding costs, per element: of the rounded and the original tensor, both float32.
Error = Callable[[Tensor, Tensor], Tensor]

_PER_OCTAVE = 32  # neighbors differ by 2.2 %; the error around its minimum is flat


def squared(rounded: Tensor, x: Tensor) -> Tensor:
    """Return ``(rounded - x)^2``."""
    return (rounded - x).square_()


def cost(error: Error, rounded: Tensor, x: Tensor) -> Tensor:
    """Return what rounding costs, per element.

    Raises:
        CalibrationError: ``error`` returns another shape than that of its arguments.
    """
    found = error(rounded, x)
    if found.shape != x.shape:
        raise CalibrationError(
            f"the error function returned shape {tuple(found.shape)}, not {tuple(x.shape)}",
            hint="return one cost per element; sums are taken over those that share a scale",
        )
    return found


def searchable(quantizer: TensorQuantizer) -> bool:
    """Return whether rounding a weight is all that its quantizer does, in a range of its choice.

    Args:
        quantizer: A weight's quantizer.
    """
    spec = quantizer.spec
    plain = quantizer.transforms is None and spec.then is None
    return plain and not spec.dynamic and spec.constant_amax is None


def multipliers(spec: QuantizerSpec, *, octaves: int) -> list[float]:
    """Return the candidates of a search, as multiples of the largest magnitude.

    They go down from 1 in steps of ``2^(-1/32)``. Floating formats of 4 bits or fewer also get
    those up to 1.5: their largest values lie so far apart (4 and 6) that it can pay to leave the
    last one unused.

    Args:
        spec: The format.
        octaves: How often the range is halved.
    """
    spread = spec.format.kind == "float" and spec.format.bits <= 4
    above = range(1, 19) if spread else ()  # 2^(18/32) = 1.48
    below = range(0, -octaves * _PER_OCTAVE - 1, -1)
    return [2 ** (step / _PER_OCTAVE) for step in (*below, *above)]


def best_range(
    x: Tensor,
    values: Range,
    spec: QuantizerSpec,
    *,
    candidates: Sequence[float],
    error: Error = squared,
) -> Range:
    """Return the multiple of a range at which rounding ``x`` costs the least, scale by scale.

    Args:
        x: Floating tensor, finite.
        values: Its range, from `bittern.numerics.measure`.
        spec: Format and granularity.
        candidates: Multiples of the range.
        error: What rounding costs, as for `best_multiple`.

    Raises:
        CalibrationError: As for `best_multiple`.
    """
    chosen = best_multiple(x, values, spec, candidates=candidates, error=error)
    return times(values, chosen)


@torch.no_grad()
def best_multiple(
    x: Tensor,
    values: Range,
    spec: QuantizerSpec,
    *,
    candidates: Sequence[float],
    error: Error = squared,
) -> Tensor:
    """Return what to multiply a range with, so that rounding ``x`` costs the least.

    Every candidate is tried with the format's own `fake_quantize`. Where several are equally good
    the first is taken, so begin with 1. A range of 0 stays 0.

    Args:
        x: Floating tensor, finite.
        values: Its range, from `bittern.numerics.measure`.
        spec: Format and granularity.
        candidates: Multiples of the range.
        error: What rounding costs per element. It gets both tensors in float32, divided by a power
            of two that brings them near 1, so that no square underflows or overflows. Only its
            sums over the elements that share a scale matter.

    Returns:
        One multiple per scale, in the shape of ``values.amax``.

    Raises:
        CalibrationError: ``error`` returns another shape than that of its arguments.
    """
    unit = unit_of(values)
    x = x.detach().float() / unit
    values = times(values, 1 / unit, whole=1 / unit)
    fitted = codec_of(spec.format).fitted
    least = torch.full_like(values.amax, torch.inf)
    chosen = torch.ones_like(values.amax)
    for candidate in candidates:
        scales = scales_for(times(values, candidate), spec, x if fitted else None)
        costs = cost(error, fake_quantize(x, spec, scales), x)
        total = summed(costs, spec).reshape(least.shape)
        better = total < least
        least = torch.where(better, total, least)
        chosen = torch.where(better, candidate, chosen)
    return chosen


def summed(values: Tensor, spec: QuantizerSpec) -> Tensor:
    """Return the sums over what shares a scale."""
    blocks, dims = as_blocks(values, spec.granularity), block_dims(spec.granularity, values.dim())
    return as_scale(blocks.sum(dims, keepdim=True) if dims else blocks, spec.granularity)


def times(values: Range, factor: Tensor | float, *, whole: Tensor | float = 1) -> Range:
    """Return a multiple of a range; ``whole`` is that of what belongs to the whole tensor."""
    amin = None if values.amin is None else values.amin * factor
    top = None if values.global_amax is None else values.global_amax * whole
    return Range(values.amax * factor, amin=amin, global_amax=top)


def unit_of(values: Range) -> Tensor:
    """Return a power of two near the largest magnitude, 1 for zeros."""
    largest = values.amax if values.amin is None else torch.maximum(values.amax, -values.amin)
    largest = largest.max()
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    unit = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(largest > 0, unit, torch.ones_like(unit))
