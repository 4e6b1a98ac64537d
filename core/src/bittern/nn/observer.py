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
        if self._amax is not None and value.shape != self._amax.shape:
            raise CalibrationError(
                f"inputs of different shapes have no common scales: granularity "
                f"{extremes} gives {tuple(self._amax.shape)} and {tuple(value.shape)}",
                where=self._name or None,
                hint="use granularity: tensor, or make the scales dynamic",
            )
        self._amax = value if self._amax is None else torch.maximum(self._amax, value)
        finite = self._amax.isfinite()
        finite = finite.all() if finite.dim() else finite
        self._good = finite.long() if self._good is None else self._good + finite
        self._batches.append(self._shared.batch)

    def result(self) -> Tensor | None:
        """Return the largest extremes seen, ``None`` if no tensor was."""
        return self._amax

    def first_bad_batch(self) -> int | None:
        """Return the index of the first batch with NaN or Inf."""
        if self._good is None:
            return None
        good = int(self._good)
        return self._batches[good] if good < len(self._batches) else None
