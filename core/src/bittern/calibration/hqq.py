"""Scales and zero points of weights from the weights alone: no data, no forward pass.

The aim is that of half-quadratic quantization (Badri and Shaji, Half-Quadratic Quantization of
Large Machine Learning Models, 2023): per group, the scale and the zero point at which rounding
costs the least. There the scale stays that of the extremes and the zero point, a floating number,
is found by splitting the problem in two. The zero points of int4 files are integers, and rounding
what the splitting finds loses all it gained. So this searches: over scales, over the integer zero
points around the middle of what each scale covers, and then alternates between rounding and the
scale that fits the rounded numbers best. All of it is taken scale by scale, and makes none worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.max import run_max
from bittern.calibration.search import searchable
from bittern.errors import CalibrationError
from bittern.numerics import Range, codec_of, fake_quantize, scales_for
from bittern.numerics.layout import as_blocks, as_scale, block_dims
from bittern.records import Plan, QuantizerSpec

__all__ = ["fit_range", "run_hqq"]

_PER_OCTAVE = 16  # the fit moves on from there
_ABOVE, _BELOW = 2, 16  # steps above and below the scale of the extremes
_ZEROS = (0, -1, 1)


def run_hqq(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    p: float = 2.0,
    rounds: int = 8,
) -> None:
    """Set the ranges of weights to those with the least rounding error, zero points included.

    Activations, if any are static, are calibrated by max.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data; ``None`` when there is none.
        context: Services.
        p: Errors count by their ``p``-th power. Below 2, few large errors are preferred to many
            small ones.
        rounds: How often the scales are fitted to the rounded numbers; only for ``p`` of 2.

    Raises:
        CalibrationError: ``p`` or ``rounds`` is out of range; or NaN or Inf in a weight or an
            activation, names the module and the batch.
    """
    if not 0 < p <= 8:
        raise CalibrationError(f"p is {p}", hint="choose p above 0 and up to 8, as 2")
    if rounds < 0 or rounds != int(rounds):
        raise CalibrationError(f"rounds is {rounds}", hint="choose a whole number, as 8")
    run_max(model, plan, forward, context)
    for _, module in context.modules(model):
        weights = [q for q in module.slots().values() if q.tensor is not None]
        fitted = [q for q in weights if searchable(q) and not q.codec.fitted]
        if not fitted:
            continue
        with context.access(module, write=False):
            for quantizer in fitted:
                weight = getattr(module, quantizer.tensor or "").detach()
                start = quantizer.range
                assert start is not None
                quantizer.set_range(fit_range(weight, start, quantizer.spec, p=p, rounds=rounds))


@torch.no_grad()
def fit_range(
    x: Tensor, start: Range, spec: QuantizerSpec, *, p: float = 2.0, rounds: int = 8
) -> Range:
    """Return the range at which rounding ``x`` costs the least, scale by scale.

    Args:
        x: Floating tensor, finite.
        start: Its range, from `bittern.numerics.measure`; nothing worse is returned.
        spec: Format and granularity.
        p: Errors count by their ``p``-th power.
        rounds: How often the scales are fitted to the rounded numbers; only for ``p`` of 2.
    """
    largest = torch.frexp(x.detach().float().abs().max()).exponent.clamp(-126, 126)
    unit = torch.ldexp(torch.ones_like(largest, dtype=torch.float32), largest)
    x = x.detach().float() / unit  # so that no power of an error underflows or overflows
    found = _times(start, 1 / unit)
    least = _cost(x, found, spec, p)
    for candidate in _candidates(found, spec):
        found, least = _better(x, spec, p, (found, least), candidate)
    for _ in range(rounds if p == 2 else 0):
        found, least = _better(x, spec, p, (found, least), _fit(x, found, spec))
    return _times(found, unit)


def _candidates(start: Range, spec: QuantizerSpec) -> Iterator[Range]:
    """Yield multiples of a range; with zero points, around the middle of what it covers."""
    codec = codec_of(spec.format)
    for step in range(_ABOVE, -_BELOW - 1, -1):
        multiple = 2 ** (step / _PER_OCTAVE)
        if start.amin is None:
            yield _times(start, multiple, whole=1)
            continue
        low, high = codec.min_value, codec.max_value
        scale = (start.amax - start.amin) * (multiple / (high - low))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        middle = (low + high) / 2 - (start.amax + start.amin) / 2 / scale
        for shift in _ZEROS:
            zero = (middle.round() + shift).clamp(low, high)
            yield Range((high - zero) * scale, amin=(low - zero) * scale)


def _fit(x: Tensor, values: Range, spec: QuantizerSpec) -> Range:
    """Return a range with the scale that brings the rounded numbers closest to ``x``.

    With codes ``q`` less the zero point fixed, ``|x - s q|^2`` is least at ``s = x q / q q``.
    """
    rounded = fake_quantize(x, spec, scales_for(values, spec))
    ratio = _sum(x * rounded, spec) / _sum(rounded * rounded, spec)
    usable = ratio.isfinite() & (ratio > 0)
    ratio = torch.where(usable, ratio, torch.ones_like(ratio)).reshape(values.amax.shape)
    return _times(values, ratio, whole=1)


def _better(
    x: Tensor, spec: QuantizerSpec, p: float, best: tuple[Range, Tensor], other: Range
) -> tuple[Range, Tensor]:
    """Return the better one of two ranges, scale by scale, and what it costs."""
    found, least = best
    costs = _cost(x, other, spec, p)
    better = costs < least
    amin = None
    if found.amin is not None and other.amin is not None:
        amin = torch.where(better, other.amin, found.amin)
    chosen = replace(found, amax=torch.where(better, other.amax, found.amax), amin=amin)
    return chosen, torch.where(better, costs, least)


def _cost(x: Tensor, values: Range, spec: QuantizerSpec, p: float) -> Tensor:
    """Return the sum of the errors' powers, one per scale."""
    error = (fake_quantize(x, spec, scales_for(values, spec)) - x).abs_()
    powers = error.square_() if p == 2 else error.pow_(p)
    return _sum(powers, spec).reshape(values.amax.shape)


def _sum(values: Tensor, spec: QuantizerSpec) -> Tensor:
    """Add up over what shares a scale."""
    blocks, dims = as_blocks(values, spec.granularity), block_dims(spec.granularity, values.dim())
    return as_scale(blocks.sum(dims, keepdim=True) if dims else blocks, spec.granularity)


def _times(values: Range, factor: Tensor | float, *, whole: float | None = None) -> Range:
    """Return a multiple of a range; ``whole`` is that of what belongs to the whole tensor."""
    amin = None if values.amin is None else values.amin * factor
    top = values.global_amax
    if top is not None:
        top = top * (factor if whole is None else whole)
    return Range(values.amax * factor, amin=amin, global_amax=top)
