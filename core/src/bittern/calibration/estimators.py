"""Ranges from histograms: percentile, entropy, least rounding error. Pure functions.

Each returns an amax, float32, in the shape of ``histogram.amax``. Channels of zeros have amax 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bittern.calibration.histogram import Histogram
from bittern.calibration.search import Error, cost, multipliers, squared
from bittern.errors import CalibrationError
from bittern.numerics import codec_of, fake_quantize, scales_from_amax
from bittern.records import PerChannel, QuantizerSpec

__all__ = ["check_percentile", "entropy_amax", "mse_amax", "percentile_amax"]

_OCTAVES = 7  # mse looks down to 1/128 of the largest magnitude
_CANDIDATES = 512  # of entropy, per channel
_AT_ONCE = 2**21  # bins of candidates that are compared together: bounds the memory


def check_percentile(p: float) -> None:
    """Raise unless ``p`` is a percentile.

    Raises:
        CalibrationError: It is not in (0, 100].
    """
    number = isinstance(p, int | float) and not isinstance(p, bool)
    if not number or not 0 < p <= 100:
        raise CalibrationError(
            f"p is {p!r}", hint="choose a percentile above 0 and up to 100, for example 99.99"
        )


def percentile_amax(histogram: Histogram, p: float, *, skip_zeros: bool = False) -> Tensor:
    """Return the magnitude that ``p`` percent of the elements do not exceed.

    It is the upper edge of the bin that holds the ``ceil(p / 100 * n)``-th smallest of ``n``
    magnitudes (the nearest-rank percentile), so at most one bin too large.

    Args:
        histogram: The magnitudes.
        p: Above 0 and up to 100, which gives the maximum.
        skip_zeros: Leave out exact zeros, as padding and ReLU make them.

    Raises:
        CalibrationError: ``p`` is out of range.
    """
    check_percentile(p)
    counts = histogram.counts.double()
    if skip_zeros:
        counts[:, 0] = 0
    cumulative = counts.cumsum(1)
    total = cumulative[:, -1:]
    rank = (total * (p / 100) * (1 - 1e-15)).ceil()  # 99.9 % of 1000 are 999, not 1000
    rank = torch.minimum(rank, total)
    index = (cumulative < rank).sum(1, keepdim=True)
    return _bounded(histogram.edges.gather(1, index), histogram)


def entropy_amax(histogram: Histogram, spec: QuantizerSpec) -> Tensor:
    """Return the range that loses the least information (Migacz, GTC 2017).

    A candidate range ends at the upper edge of a bin. The reference distribution is the histogram
    up to there, what lies beyond added to its last bin. The quantized one replaces the counts of
    all bins that the format rounds to one value by their mean over the bins that are not empty. The
    range with the smallest Kullback-Leibler divergence of the two wins, the largest on a tie.

    Two things differ from the original, which is for integers: the bins of one value are those
    that the format itself rounds to it, so that any format will do, and exact zeros do not count,
    since every range represents them.

    Args:
        histogram: The magnitudes.
        spec: The format.
    """
    used = (histogram.counts[:, 1:] > 0).any(0).nonzero().flatten()  # empty bins cost only time
    if len(used) == 0:
        return torch.zeros_like(histogram.amax)
    bins = _Bins(
        histogram.counts[:, 1:][:, used].double(),
        histogram.centers[:, used],
        histogram.edges[:, 1:][:, used],
    )
    index = torch.arange(len(used), device=used.device)
    last = torch.where(bins.counts > 0, index, 0).amax(1, keepdim=True)
    filled = (bins.counts > 0).cumsum(1)  # few data leave gaps, in which a range tells nothing
    first = (filled < 2 ** (spec.format.bits - 1)).sum(1, keepdim=True)
    stride = (last - first).clamp_min(0) // _CANDIDATES + 1
    best = torch.full(last.shape, torch.inf, dtype=torch.float64, device=used.device)
    chosen = last
    step = max(1, _AT_ONCE // bins.counts.numel())
    for offsets in torch.split(index[:_CANDIDATES], step):
        ends = torch.minimum(torch.maximum(last - offsets * stride, first), last)
        found = _divergence(bins, ends, spec)
        position = found.argmin(1, keepdim=True)  # the first, so the largest range, on a tie
        least = found.gather(1, position)
        better = least < best
        chosen = torch.where(better, ends.gather(1, position), chosen)
        best = torch.where(better, least, best)
    return _bounded(bins.edges.gather(1, chosen), histogram)


def mse_amax(histogram: Histogram, spec: QuantizerSpec, *, error: Error = squared) -> Tensor:
    """Return the range with the least mean rounding error, that of clipping included.

    The error is ``sum_i counts[i] * error(Q(c_i), c_i)`` over the centers ``c_i`` of the bins, with
    the format's own `fake_quantize` as ``Q``: the objective of Sakr et al., Optimal Clipping and
    Magnitude-aware Differentiation for Improved Quantization-aware Training, ICML 2022. Signed data
    is taken for symmetric: half of the weight is on ``-c_i``, since integers reach one code further
    down than up. Candidates go down from the maximum in steps of 2.2 % to 1/128 of it.

    Args:
        histogram: The magnitudes.
        spec: The format.
        error: What rounding costs per element.
    """
    counts = histogram.counts[:, 1:].double()
    centers = torch.arange(histogram.bins, device=counts.device) + 0.5  # in widths of the bins
    if codec_of(spec.format).signed:
        centers, counts = torch.cat([centers, -centers]), torch.cat([counts, counts], 1)
    factors = torch.tensor(multipliers(spec, octaves=_OCTAVES), device=counts.device)
    ranges = histogram.amax.reshape(-1, 1) / histogram.width * factors  # (channels, candidates)
    best = torch.empty_like(ranges[:, :1])
    step = max(1, _AT_ONCE // (len(factors) * len(centers)))
    for begin in range(0, len(ranges), step):
        some = ranges[begin : begin + step]
        x = centers.expand(some.numel(), -1)
        scales = scales_from_amax(some.reshape(-1, 1), spec)
        costs = cost(error, fake_quantize(x, _by_row(spec), scales), x)
        totals = costs.reshape(*some.shape, -1) * counts[begin : begin + step, None]
        index = totals.sum(2).argmin(1, keepdim=True)  # the first, too
        best[begin : begin + step] = some.gather(1, index)
    return (best * histogram.width).reshape(histogram.amax.shape)


@dataclass(frozen=True)
class _Bins:
    """The bins of a histogram that hold something in some channel, ``(channels, bins)`` each."""

    counts: Tensor
    centers: Tensor
    edges: Tensor


def _divergence(bins: _Bins, ends: Tensor, spec: QuantizerSpec) -> Tensor:
    """Return the divergence of each candidate, ``(channels, candidates)``.

    Args:
        bins: The bins.
        ends: The last bin of each candidate, ``(channels, candidates)``.
        spec: The format.
    """
    candidates = ends.shape[1]
    counts, centers = (t.repeat_interleave(candidates, 0) for t in (bins.counts, bins.centers))
    amax = bins.edges.gather(1, ends).reshape(-1, 1)
    values = fake_quantize(centers, _by_row(spec), scales_from_amax(amax, spec))
    changes = values[:, 1:] != values[:, :-1]
    level = torch.nn.functional.pad(changes.cumsum(1), (1, 0))  # numbers the values of each row

    last = ends.reshape(-1, 1)
    kept = torch.where(torch.arange(counts.shape[1], device=counts.device) <= last, counts, 0.0)
    tail = counts.sum(1, keepdim=True) - kept.sum(1, keepdim=True)
    reference = kept.scatter_add(1, last, tail)

    filled = (kept > 0).double()
    total = torch.zeros_like(kept).scatter_add_(1, level, kept)
    among = torch.zeros_like(kept).scatter_add_(1, level, filled)
    quantized = (total / among.clamp_min(1)).gather(1, level) * filled

    p = reference / reference.sum(1, keepdim=True)
    q = quantized / quantized.sum(1, keepdim=True)
    terms = torch.where(p > 0, p * (p / q).log(), 0.0)  # Inf where q is 0: what is beyond is lost
    return terms.sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(ends.shape)


def _by_row(spec: QuantizerSpec) -> QuantizerSpec:
    return replace(spec, granularity=PerChannel(0))


def _bounded(edges: Tensor, histogram: Histogram) -> Tensor:
    return torch.minimum(edges.reshape(histogram.amax.shape), histogram.amax)
