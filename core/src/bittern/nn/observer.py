"""Statistics of activations during calibration, kept on the device: no host sync per batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from bittern.errors import CalibrationError
from bittern.nn.experts import Experts
from bittern.nn.extremes import Extremes
from bittern.records import Granularity

__all__ = ["MaxObserver", "Observer", "SharedInputs"]

T = TypeVar("T")

_TOGETHER, _SMALL = 32, 2**16  # how many values of so many numbers wait to be folded


@dataclass
class _Seen:
    """What is known about one tensor, as long as it is not written to."""

    tensor: weakref.ref[Tensor]
    version: int
    values: dict[Hashable, Any] = field(default_factory=dict)


class SharedInputs:
    """Remembers statistics of tensors just seen, so that q/k/v reduce their shared input once.

    One instance serves all quantizers during a calibration. What is remembered is used only for the
    very same tensor object with no write in between; tensors without a version counter (made under
    ``inference_mode``) are never remembered. Only the last few tensors are kept: consumers of one
    input run close together.

    Attributes:
        batch: Index of the batch that is running, set by the calibration loop.
    """

    def __init__(self, *, remember: int = 4) -> None:
        self.batch = 0
        self._remember = remember
        self._seen: list[_Seen] = []

    def amax(self, x: Tensor, granularity: Granularity) -> Tensor:
        """Return ``amax(x, granularity)``, computed at most once per tensor."""
        return self.extremes(x, Extremes(granularity))

    def extremes(self, x: Tensor, kind: Extremes) -> Tensor:
        """Return ``kind.of(x)``, computed at most once per tensor."""
        return self.once(x, kind, lambda: kind.of(x))

    def once(self, x: Tensor, kind: Hashable, compute: Callable[[], T]) -> T:
        """Return a statistic of ``x``, computed at most once per tensor.

        Args:
            x: The tensor.
            kind: Which statistic, with all its parameters.
            compute: Computes it.
        """
        if x.is_inference():
            return compute()
        known = next((s for s in self._seen if s.tensor() is x and s.version == x._version), None)
        if known is None:
            known = _Seen(weakref.ref(x), x._version)
            self._seen.append(known)
            if len(self._seen) > self._remember:
                del self._seen[0]
        if kind not in known.values:
            known.values[kind] = compute()
        value: T = known.values[kind]
        return value


class Observer(Protocol):
    """Collects the statistics of one static activation quantizer."""

    def observe(self, x: Tensor, experts: Experts | None = None) -> None:
        """Take in one tensor.

        Args:
            x: The tensor.
            experts: Which rows belong to which expert, for stacked activations.
        """
        ...

    def first_bad_batch(self) -> int | None:
        """Return the index of the first batch with NaN or Inf, ``None`` if there was none."""
        ...


class MaxObserver:
    """Running maximum of ``|x|``, or of both ends of the range.

    Values are kept for a while and folded together: a batch costs no operation but the statistic.
    NaN and Inf propagate through the running maximum. The number of calls before it turned bad is
    counted on the device and read once at the end, which names the batch without a sync in the
    loop.

    Args:
        extremes: What is kept of a tensor.
        shared: Shared with the other quantizers of the model.
        name: The quantizer's name, for errors.
    """

    def __init__(self, extremes: Extremes, shared: SharedInputs, *, name: str = "") -> None:
        self._extremes = extremes
        self._name = name
        self._shared = shared
        self._waiting: list[Tensor] = []
        self._amax: Tensor | None = None
        self._good: Tensor | None = None
        self._batches: list[int] = []

    @torch.no_grad()
    def observe(self, x: Tensor, experts: Experts | None = None) -> None:
        """Take in one tensor; an empty one (an expert without tokens) counts for nothing.

        Raises:
            CalibrationError: Its scales have another shape than those of earlier tensors.
        """
        if x.numel() == 0:
            return
        extremes = self._extremes
        if experts is not None:
            value = extremes.of(x, experts)
        else:
            value = self._shared.extremes(x, extremes)
        known = self._waiting[0] if self._waiting else self._amax
        if known is not None and value.shape != known.shape:
            raise CalibrationError(
                f"inputs of different shapes have no common scales: granularity "
                f"{extremes} gives {tuple(known.shape)} and {tuple(value.shape)}",
                where=self._name or None,
                hint="use granularity: tensor, or make the scales dynamic",
            )
        self._waiting.append(value)
        self._batches.append(self._shared.batch)
        if len(self._waiting) >= (_TOGETHER if value.numel() <= _SMALL else 1):
            self._fold()

    def _fold(self) -> None:
        """Bring the values that wait and the maximum together."""
        if not self._waiting:
            return
        values = torch.stack([value.to(self._waiting[0].device) for value in self._waiting])
        self._waiting = []
        largest = values.amax(0)
        known = self._amax
        self._amax = largest if known is None else torch.maximum(known, largest)
        bad = ~values.isfinite().reshape(len(values), -1).all(1)
        good = (bad.cumsum(0) == 0).sum()  # how many before the first bad one
        if self._good is not None and known is not None:
            good = self._good + good * known.isfinite().all()
        self._good = good

    def result(self) -> Tensor | None:
        """Return the largest extremes seen, ``None`` if no tensor was."""
        self._fold()
        return self._amax

    def first_bad_batch(self) -> int | None:
        """Return the index of the first batch with NaN or Inf."""
        self._fold()
        if self._good is None:
            return None
        good = int(self._good)
        return self._batches[good] if good < len(self._batches) else None
