"""Ranges from histograms: percentile, entropy, least rounding error. Pure functions.

Each returns an amax, float32, in the shape of ``histogram.amax``, never larger than that. Channels
of zeros have amax 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bittern.calibration.histogram import Histogram
from bittern.calibration.search import Error, best_range, multipliers, squared
from bittern.errors import CalibrationError
from bittern.numerics import Range, codec_of, fake_quantize, scales_from_amax
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
    counts = histogram.counts[:, 1:].double()
    channels, bins = counts.shape
    device = counts.device
    last = _last(counts)
    first = last.clamp_max(2 ** (spec.format.bits - 1))
    stride = (last - first) // _CANDIDATES + 1
    best = torch.full((channels, 1), torch.inf, dtype=torch.float64, device=device)
    chosen = last.clone()
    step = max(1, _AT_ONCE // (channels * bins))
    for begin in range(0, min(bins, _CANDIDATES), step):
        offsets = torch.arange(begin, min(begin + step, bins, _CANDIDATES), device=device)
        ends = torch.maximum(last - offsets * stride, first).clamp_min(1)
        found = _divergence(histogram, counts, ends, spec)
        least, index = found.min(1, keepdim=True)
        better = least < best
        chosen = torch.where(better, ends.gather(1, index), chosen)
        best = torch.where(better, least, best)
    return _bounded(histogram.edges.gather(1, chosen), histogram)


def mse_amax(histogram: Histogram, spec: QuantizerSpec, *, error: Error = squared) -> Tensor:
    """Return the range with the least mean rounding error, that of clipping included.

    The error is ``sum_i counts[i] * error(Q(c_i), c_i)`` over the centers ``c_i`` of the bins, with
    the format's own `fake_quantize` as ``Q`` (Sakr et al., Optimal Clipping and Magnitude-aware
    Differentiation, ICML 2022, section 3). Signed data is taken for symmetric: half of the centers'
    weight is on ``-c_i``, since integers reach one code further down than up. Candidates go down
    from the maximum in steps of 2.2 % to 1/128 of it.

    Args:
        histogram: The magnitudes.
        spec: The format.
        error: What rounding costs per element.
    """
    centers, counts = histogram.centers, histogram.counts[:, 1:].double()
    if codec_of(spec.format).signed:
        centers, counts = torch.cat([centers, -centers], 1), torch.cat([counts, counts], 1)
    found = best_range(
        centers,
        Range(histogram.amax.reshape(-1, 1)),
        _by_row(spec),
        candidates=multipliers(spec, octaves=_OCTAVES),
        error=error,
        weight=counts,
    )
    return found.amax.reshape(histogram.amax.shape)


def _by_row(spec: QuantizerSpec) -> QuantizerSpec:
    return replace(spec, granularity=PerChannel(0))


def _last(counts: Tensor) -> Tensor:
    """Return how many bins there are up to the last that is not empty, ``(channels, 1)``."""
    index = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    return torch.where(counts > 0, index, 0).amax(1, keepdim=True)


def _divergence(histogram: Histogram, counts: Tensor, ends: Tensor, spec: QuantizerSpec) -> Tensor:
    """Return the divergence of each candidate, ``(channels, candidates)``.

    Args:
        histogram: The magnitudes.
        counts: Its counts without the zeros, float64.
        ends: Number of bins that each candidate keeps, ``(channels, candidates)``.
        spec: The format.
    """
    channels, bins = counts.shape
    candidates = ends.shape[1]
    rows = channels * candidates
    amax = histogram.edges.gather(1, ends).reshape(rows, 1)
    centers = histogram.centers.repeat_interleave(candidates, 0)
    values = fake_quantize(centers, _by_row(spec), scales_from_amax(amax, spec))
    changes = values[:, 1:] != values[:, :-1]
    level = torch.nn.functional.pad(changes.cumsum(1), (1, 0))  # numbers the values of each row

    ends = ends.reshape(rows, 1)
    inside = torch.arange(bins, device=counts.device) < ends
    every = counts.repeat_interleave(candidates, 0)
    kept = torch.where(inside, every, 0.0)
    tail = every.sum(1, keepdim=True) - kept.sum(1, keepdim=True)
    reference = kept.scatter_add(1, ends - 1, tail)

    filled = (kept > 0).double()
    total = torch.zeros_like(kept).scatter_add_(1, level, kept)
    among = torch.zeros_like(kept).scatter_add_(1, level, filled)
    quantized = (total / among.clamp_min(1)).gather(1, level) * filled

    p = reference / reference.sum(1, keepdim=True)
    q = quantized / quantized.sum(1, keepdim=True)
    terms = torch.where(p > 0, p * (p / q).log(), 0.0)  # Inf where q is 0: what is beyond is lost
    return terms.sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(channels, candidates)


def _bounded(edges: Tensor, histogram: Histogram) -> Tensor:
    return torch.minimum(edges.reshape(histogram.amax.shape), histogram.amax)
