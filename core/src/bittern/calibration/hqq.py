"""Scales and zero points of weights from the weights alone: no data, no forward pass.

The aim is that of half-quadratic quantization (Badri and Shaji, Half-Quadratic Quantization of
Large Machine Learning Models, 2023): per group, the scale and the zero point at which rounding
costs the least. There the scale stays that of the extremes and the zero point, a floating number,
is found by splitting the problem in two. The zero points of int4 files are integers, and rounding
what the splitting finds loses all it gained. So this searches, over scales and, around the middle
of what each scale covers, over integer zero points. With squares as errors few candidates are
enough: once numbers are rounded, the scale and the zero point that fit the codes best follow in
closed form, and so does an upper bound of what they cost. Whichever promises the least is rounded
next. All of it is taken scale by scale, and makes none worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.max import run_max
from bittern.calibration.search import searchable, summed, times, unit_of
from bittern.errors import CalibrationError
from bittern.numerics import Range, codec_of, fake_quantize, scales_for
from bittern.numerics.chunked import CHUNK
from bittern.records import Plan, QuantizerSpec

__all__ = ["fit_range", "run_hqq"]

_ABOVE, _BELOW = 1 / 8, 1.0  # octaves above and below the scale of the extremes
_STEP, _FINE = 1 / 8, 1 / 16  # octaves between scales, where the fit moves on from there or not
_FEW = 4  # with fewer steps from end to end, the zero point is worth a search of its own


def run_hqq(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    p: float = 2.0,
    rounds: int = 2,
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
        raise CalibrationError(f"rounds is {rounds}", hint="choose a whole number, as 2")
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


@dataclass(frozen=True)
class _Trial:
    """Ranges that were tried, each number one per scale.

    Attributes:
        values: The ranges.
        cost: What rounding costs.
        fitted: Those that fit the codes best.
        bound: What rounding with these costs, at most.
    """

    values: Range
    cost: Tensor
    fitted: Range
    bound: Tensor

    def with_better(self, other: _Trial) -> _Trial:
        """Return the better ones of two, scale by scale."""
        cheaper, promising = other.cost < self.cost, other.bound < self.bound
        return _Trial(
            _where(cheaper, other.values, self.values),
            torch.where(cheaper, other.cost, self.cost),
            _where(promising, other.fitted, self.fitted),
            torch.where(promising, other.bound, self.bound),
        )


@torch.no_grad()
def fit_range(
    x: Tensor, start: Range, spec: QuantizerSpec, *, p: float = 2.0, rounds: int = 2
) -> Range:
    """Return the range at which rounding ``x`` costs the least, scale by scale.

    Args:
        x: Floating tensor, finite.
        start: Its range, from `bittern.numerics.measure`; nothing worse is returned.
        spec: Format and granularity.
        p: Errors count by their ``p``-th power.
        rounds: How often the scales are fitted to the rounded numbers; only for ``p`` of 2.
    """
    unit = unit_of(start)  # so that no power of an error underflows or overflows
    values = times(start, 1 / unit, whole=1 / unit)
    found = [
        _fitted(part.detach().float() / unit, own, spec, p=p, rounds=rounds)
        for part, own in _parts(x, values)
    ]
    lows = [own.amin for own in found if own.amin is not None]
    amax = torch.cat([own.amax for own in found]) if len(found) > 1 else found[0].amax
    amin = torch.cat(lows) if len(lows) > 1 else found[0].amin
    return times(Range(amax, amin=amin, global_amax=values.global_amax), unit, whole=unit)


def _parts(x: Tensor, values: Range) -> Iterator[tuple[Tensor, Range]]:
    """Yield rows that share no scale with others, few enough that they stay in a CPU's cache."""
    amax, whole = values.amax, values.global_amax
    apart = 0 < amax.dim() == x.dim() and len(amax) == len(x)
    if x.device.type != "cpu" or not apart or (whole is not None and whole.numel() > 1):
        yield x, values
        return
    rows = max(1, CHUNK * len(x) // max(x.numel(), 1))
    for start in range(0, max(len(x), 1), rows):
        own = slice(start, start + rows)
        amin = None if values.amin is None else values.amin[own]
        yield x[own], Range(amax[own], amin=amin, global_amax=whole)


def _fitted(x: Tensor, values: Range, spec: QuantizerSpec, *, p: float, rounds: int) -> Range:
    """Return the range at which rounding ``x``, numbers near 1, costs the least."""
    count = summed(torch.ones_like(x), spec).reshape(values.amax.shape)
    best = _tried(x, values, spec, p=p, count=count)
    for candidate in _candidates(values, spec, fine=p != 2):
        best = best.with_better(_tried(x, candidate, spec, p=p, count=count))
    for _ in range(rounds if p == 2 else 0):
        best = best.with_better(_tried(x, best.fitted, spec, p=p, count=count))
    return best.values


def _candidates(start: Range, spec: QuantizerSpec, *, fine: bool) -> Iterator[Range]:
    """Yield multiples of a range; with zero points, around the middle of what it covers."""
    codec = codec_of(spec.format)
    low, high = codec.min_value, codec.max_value
    step = _FINE if fine else _STEP
    for index in range(round(_ABOVE / step), -round(_BELOW / step) - 1, -1):
        multiple = 2 ** (index * step)
        if start.amin is None:
            if index or fine:  # it begins with 1
                yield times(start, multiple)
            continue
        scale = (start.amax - start.amin) * (multiple / (high - low))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        middle = (low + high) / 2 - (start.amax + start.amin) / 2 / scale
        for shift in (0, -1, 1) if fine or high - low < _FEW else (0,):
            zero = (middle.round() + shift).clamp(low, high)
            yield Range((high - zero) * scale, amin=(low - zero) * scale)


def _tried(x: Tensor, values: Range, spec: QuantizerSpec, *, p: float, count: Tensor) -> _Trial:
    """Round with a range, and fit the next one to the codes.

    Less the zero point, codes times the scale are the rounded numbers ``r = x + e``. Zero points
    that are ``d`` smaller add ``t = d s`` to them all, and a factor ``f`` of the scale is best at
    ``f = 1 - (e + t)(r + t) / (r + t)^2``, where ``|f (r + t) - x|^2`` falls by the square of
    the numerator over the denominator. ``d`` is that of the unconstrained least squares, rounded.

    Args:
        x: The tensor.
        values: Its range.
        spec: Format and granularity.
        p: Errors count by their ``p``-th power.
        count: How many elements share each scale.
    """
    r = fake_quantize(x, spec, scales_for(values, spec))
    e = r - x

    def total(numbers: Tensor) -> Tensor:
        return summed(numbers, spec).reshape(values.amax.shape)

    if p != 2:
        cost = total(e.abs().pow_(p))
        return _Trial(values, cost, values, cost)
    ee, er, rr = total(e * e), total(e * r), total(r * r)
    off, cross, size, moved = ee, er, rr, values
    if values.amin is not None:
        codec = codec_of(spec.format)
        low, high = codec.min_value, codec.max_value
        scale = (values.amax - values.amin) / (high - low)
        zero = (low - values.amin / scale).round()
        e_sum, r_sum = total(e), total(r)
        slope = (r_sum * e_sum - count * er) / (count * rr - r_sum * r_sum)  # less 1
        intercept = -(e_sum + slope * r_sum) / count
        other = (zero - intercept / ((1 + slope) * scale)).round().clamp(low, high)
        other = torch.where(other.isfinite(), other, zero)
        t = (zero - other) * scale
        off = ee + 2 * t * e_sum + t * t * count
        cross = er + t * (e_sum + r_sum) + t * t * count
        size = rr + 2 * t * r_sum + t * t * count
        moved = Range((high - other) * scale, amin=(low - other) * scale)
    factor, bound = 1 - cross / size, off - cross * cross / size
    usable = factor.isfinite() & (factor > 0)
    fitted = _where(usable, times(moved, factor), values)
    return _Trial(values, ee, fitted, torch.where(usable, bound, ee))


def _where(chosen: Tensor, one: Range, other: Range) -> Range:
    """Return one range or the other, scale by scale."""
    amin = other.amin
    if one.amin is not None and amin is not None:
        amin = torch.where(chosen, one.amin, amin)
    return replace(other, amax=torch.where(chosen, one.amax, other.amax), amin=amin)
