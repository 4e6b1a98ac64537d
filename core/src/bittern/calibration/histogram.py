"""Histograms of magnitudes that grow with their range and stay on the device.

Bins are as wide as a power of two, and every histogram takes the narrowest bins that reach its
largest magnitude. So the bins of a wide histogram are unions of those of a narrow one, merging is
exact, and the result depends neither on the order nor on the size of the batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import CalibrationError
from bittern.nn.experts import Experts
from bittern.nn.extremes import Extremes
from bittern.nn.observer import MaxObserver, SharedInputs
from bittern.records import Granularity, PerChannel, PerTensor

__all__ = [
    "BINS",
    "Histogram",
    "HistogramObserver",
    "check_bins",
    "coarsened",
    "empty",
    "histogram_of",
    "merged",
]

BINS = 2048
BUDGET = 2**20  # counts of one quantizer: 8 MiB
FEWEST = 128  # per channel, even where that is more than the budget

_LOWEST = -100  # of the range's exponent: bins are never so narrow that 1 / width overflows
_PIECE = 2**24  # elements counted at once: bounds the memory of their indices
_LANES = 256  # histograms that one row is counted into, so that threads seldom meet in one bin


@dataclass(frozen=True)
class Histogram:
    """How many elements of each channel have which magnitude.

    With ``w`` the width, bin 0 holds exact zeros and bin ``i`` holds ``(i - 1) w < |x| <= i w``.

    Attributes:
        counts: int64 ``(channels, bins + 1)``; one channel for `PerTensor`.
        exponent: ``log2(w)``, int32 ``(channels, 1)``: the smallest with which the bins reach
            ``amax``.
        amax: Largest magnitude of each channel, float32, in the granularity's shape.
    """

    counts: Tensor
    exponent: Tensor
    amax: Tensor

    @property
    def bins(self) -> int:
        """Number of bins, that of the zeros not counted: a power of two."""
        return self.counts.shape[1] - 1

    @property
    def width(self) -> Tensor:
        """Width of a bin, float32 ``(channels, 1)``."""
        return _power(self.exponent)

    @property
    def edges(self) -> Tensor:
        """Upper edges, that of the zeros included; float32 ``(channels, bins + 1)``."""
        return torch.arange(self.bins + 1, device=self.counts.device) * self.width

    @property
    def centers(self) -> Tensor:
        """Middles of the bins, that of the zeros left out; float32 ``(channels, bins)``."""
        return (torch.arange(self.bins, device=self.counts.device) + 0.5) * self.width


@torch.no_grad()
def histogram_of(
    x: Tensor, granularity: Granularity, *, amax: Tensor, bins: int = BINS
) -> Histogram:
    """Count the magnitudes of one tensor; nothing waits for the device.

    Args:
        x: Floating tensor, not empty. NaN and Inf are counted in some bin.
        granularity: `PerTensor` or `PerChannel`.
        amax: ``amax(x, granularity)``.
        bins: Bins of each channel, a power of two. There are fewer where all channels together
            would need more than 8 MiB: 256 for 4096 channels, but never less than 128.
    """
    rows = _rows(x, granularity)
    channels, size = rows.shape
    bins = _affordable(bins, channels)
    exponent = _exponent(amax, bins)
    lanes = math.gcd(size, _LANES) if channels == 1 and x.device.type != "cpu" else 1
    rows = rows.reshape(channels * lanes, size // lanes)
    counts = torch.zeros(channels * lanes, bins + 1, dtype=torch.int64, device=x.device)
    one = torch.ones((), dtype=torch.int64, device=x.device)
    cache = 2**18 if x.device.type == "cpu" else _PIECE
    per_width = _power(-exponent)
    for piece in torch.split(rows, max(1, cache // len(rows)), dim=1):
        # The product is exact, but for tiny numbers beside huge ones, which count as zeros.
        index = piece.abs().float().mul_(per_width).ceil_().int().clamp_(0, bins)
        counts.scatter_add_(1, index.long(), one.expand(index.shape))
    return Histogram(counts.reshape(channels, lanes, bins + 1).sum(1), exponent, amax)


def empty(amax: Tensor, *, bins: int = BINS) -> Histogram:
    """Return the histogram of no data, with the bins that reach ``amax``."""
    channels = amax.numel()
    bins = _affordable(bins, channels)
    counts = torch.zeros(channels, bins + 1, dtype=torch.int64, device=amax.device)
    return Histogram(counts, _exponent(amax, bins), amax)


@torch.no_grad()
def merged(one: Histogram, other: Histogram) -> Histogram:
    """Return the histogram of the data of both; they have the same channels and bins."""
    exponent = torch.maximum(one.exponent, other.exponent)
    counts = _counts(one, exponent) + _counts(other, exponent)
    return Histogram(counts, exponent, torch.maximum(one.amax, other.amax))


@torch.no_grad()
def coarsened(histogram: Histogram, amax: Tensor) -> Histogram:
    """Return the same data in the bins that reach ``amax``, which is no smaller than its own."""
    exponent = _exponent(amax, histogram.bins)
    return Histogram(_counts(histogram, exponent), exponent, amax)


def _counts(histogram: Histogram, exponent: Tensor) -> Tensor:
    """Return the counts of bins as wide as two to the ``exponent``, which is no smaller."""
    doublings = exponent - histogram.exponent
    doublings = doublings.clamp(0, histogram.bins.bit_length()).long()
    index = torch.arange(histogram.bins + 1, device=doublings.device)
    index = (index + (1 << doublings) - 1) >> doublings
    return torch.zeros_like(histogram.counts).scatter_add_(1, index, histogram.counts)


class HistogramObserver:
    """Histogram of ``|x|``.

    It costs one pass over each tensor and one merge of the counts, and keeps 8 bytes per bin and
    channel. A tensor that several quantizers read is counted once.

    Args:
        granularity: Which elements share a scale: `PerTensor` or `PerChannel`.
        shared: Shared with the other quantizers of the model.
        bins: As for `histogram_of`.
        signed: Whether there may be negative numbers; otherwise `negative` tells of them.
        name: The quantizer's name, for errors.

    Raises:
        CalibrationError: ``bins`` is no power of two, or the granularity is another.
    """

    def __init__(
        self,
        granularity: Granularity,
        shared: SharedInputs,
        *,
        bins: int = BINS,
        signed: bool = True,
        name: str = "",
    ) -> None:
        if not isinstance(granularity, PerTensor | PerChannel):
            raise CalibrationError(
                f"there is no histogram for granularity {granularity}",
                where=name or None,
                hint="use algorithm: max, or granularity: tensor or channel",
            )
        check_bins(bins)
        self._granularity = granularity
        self._shared = shared
        self._bins = bins
        self._extremes = Extremes(granularity)
        self._signed = signed
        self._max = MaxObserver(Extremes(granularity, both=not signed), shared, name=name)
        self._histogram: Histogram | None = None

    @torch.no_grad()
    def observe(self, x: Tensor, experts: Experts | None = None) -> None:
        """Take in one tensor; an empty one (an expert without tokens) counts for nothing.

        Args:
            x: The tensor.
            experts: Ranges are not one per expert; ignored.

        Raises:
            CalibrationError: Its scales have another shape than those of earlier tensors.
        """
        if x.numel() == 0:
            return
        self._max.observe(x)  # it knows about shapes, NaN and Inf

        def count() -> Histogram:
            amax = self._shared.once(x, self._extremes, lambda: self._extremes.of(x))
            return histogram_of(x, self._granularity, amax=amax, bins=self._bins)

        found = self._shared.once(x, ("histogram", self._granularity, self._bins), count)
        known = self._histogram
        self._histogram = found if known is None else merged(known, found)

    def result(self) -> Histogram | None:
        """Return the histogram of all tensors, ``None`` if there was none."""
        return self._histogram

    def negative(self) -> bool:
        """Return whether there were negative numbers where there must be none."""
        found = self._max.result()
        return not self._signed and found is not None and bool((found[1] > 0).any())

    def first_bad_batch(self) -> int | None:
        """Return the index of the first batch with NaN or Inf."""
        return self._max.first_bad_batch()


def check_bins(bins: int) -> None:
    """Raise unless a histogram can have so many bins.

    Raises:
        CalibrationError: It cannot.
    """
    whole = isinstance(bins, int) and not isinstance(bins, bool)
    if not whole or not 16 <= bins <= 2**16 or bins.bit_count() != 1:
        raise CalibrationError(
            f"a histogram cannot have {bins} bins", hint="choose a power of two from 16 to 65536"
        )


def _affordable(bins: int, channels: int) -> int:
    """Return how many bins each channel gets: a power of two within the budget."""
    fitting = 1 << max(BUDGET // channels, 1).bit_length() - 1
    return min(bins, max(FEWEST, fitting))


def _rows(x: Tensor, granularity: Granularity) -> Tensor:
    """Return ``x`` as ``(channels, elements of each)``."""
    if not isinstance(granularity, PerChannel):
        return x.reshape(1, -1)
    kept = sorted({axis % x.dim() for axis in granularity.axes})
    others = [dim for dim in range(x.dim()) if dim not in kept]
    channels = math.prod(x.shape[dim] for dim in kept)
    return x.permute(*kept, *others).reshape(channels, -1)


def _exponent(amax: Tensor, bins: int) -> Tensor:
    """Return the smallest ``k`` with ``amax <= bins * 2^k``, int32 ``(channels, 1)``.

    It is the same for all amax below 2^-100, and bounded for NaN and Inf.
    """
    mantissa, exponent = torch.frexp(amax.reshape(-1, 1))
    exponent = exponent - (mantissa == 0.5).int()
    exponent = torch.where(amax.reshape(-1, 1) > 0, exponent, _LOWEST).clamp(_LOWEST, 128)
    return exponent - (bins.bit_length() - 1)


def _power(exponent: Tensor) -> Tensor:
    """Return ``2^exponent``, float32 and exact, by its bits; exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)
