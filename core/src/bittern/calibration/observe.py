"""One data pass that collects statistics of what quantizers see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.histogram import BINS, Histogram, HistogramObserver, coarsened, empty
from bittern.calibration.reduce import agree, reduce_max, reduce_sum
from bittern.errors import CalibrationError
from bittern.nn import TensorQuantizer, switched_off
from bittern.nn.extremes import Extremes
from bittern.nn.observer import MaxObserver, Observer

__all__ = ["Maxima", "observe", "observe_histograms", "observe_max"]


@dataclass(frozen=True)
class Maxima:
    """What a data pass found.

    Attributes:
        values: Name to the extremes over all batches and ranks, ``None`` where no data came by.
        alike: Whether all of them saw equally many tensors in every batch: then those that read
            one tensor have seen the same.
    """

    values: dict[str, Tensor | None]
    alike: bool


class _Observer(MaxObserver):
    """Tells in which batches it saw tensors."""

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch of every tensor."""
        return tuple(self._batches)


def observe(
    model: nn.Module,
    observers: Mapping[str, tuple[TensorQuantizer, Observer]],
    forward: Forward,
    context: CalibrationContext,
) -> CalibrationError | None:
    """Run the unquantized model over the data while the observers look.

    Args:
        model: The converted model.
        observers: Name to an activation quantizer and what collects its statistics.
        forward: Runs the data.
        context: Says which quantizers are calibrated; those are off.

    Returns:
        What to raise once all ranks know of it: NaN or Inf in an activation; names the quantizer
        and the batch.
    """
    with switched_off(q for _, q in context.quantizers(model)):  # as the unquantized model has it
        try:
            for quantizer, observer in observers.values():
                quantizer.observer = observer
            forward()
        finally:
            for quantizer, _ in observers.values():
                quantizer.observer = None
    for quantizer, observer in observers.values():
        bad = observer.first_bad_batch()
        if bad is not None:
            return CalibrationError(
                f"the activations hold NaN or Inf in batch {bad}",
                where=quantizer.name,
                hint="run that batch through the unquantized model in a wider dtype "
                "(--dtype float32), or leave it out",
            )
    return None


def observe_max(
    model: nn.Module,
    watched: Mapping[str, tuple[TensorQuantizer, Extremes]],
    forward: Forward,
    context: CalibrationContext,
) -> Maxima:
    """Run the unquantized model over the data and return the extremes.

    Args:
        model: The converted model.
        watched: Name to an activation quantizer and the statistic to keep.
        forward: Runs the data.
        context: Services.

    Raises:
        CalibrationError: NaN or Inf in an activation; names the quantizer and the batch.
    """
    observers = {
        name: (quantizer, _Observer(extremes, context.shared, name=quantizer.name))
        for name, (quantizer, extremes) in watched.items()
    }
    problem = observe(model, observers, forward, context)
    found = {name: observer.result() for name, (_, observer) in observers.items()}
    reduced = reduce_max(found, problem)
    values = {
        name: None if value is None else value.to(_device(found[name], value))
        for name, value in reduced.items()
    }
    own = len({observer.batches for _, observer in observers.values()}) <= 1
    return Maxima(values, all(agree(payload=own)))


def observe_histograms(
    model: nn.Module,
    watched: Mapping[str, TensorQuantizer],
    forward: Forward,
    context: CalibrationContext,
    *,
    bins: int = BINS,
) -> dict[str, Histogram | None]:
    """Run the unquantized model over the data and return the histograms of the magnitudes.

    Args:
        model: The converted model.
        watched: Activation quantizers per tensor or per channel, by name.
        forward: Runs the data.
        context: Services.
        bins: As for `HistogramObserver`.

    Returns:
        Name to the histogram over all batches and ranks, ``None`` where no data came by.

    Raises:
        CalibrationError: NaN or Inf in an activation; names the quantizer and the batch. Or
            negative numbers for a format without.
    """
    observers = {
        name: (
            q,
            HistogramObserver(
                q.spec.granularity,
                context.shared,
                bins=bins,
                signed=q.codec.signed,
                name=q.name,
            ),
        )
        for name, q in watched.items()
    }
    problem = observe(model, observers, forward, context)
    for quantizer, observer in observers.values():
        if problem is None and observer.negative():  # magnitudes would hide them
            problem = CalibrationError(
                f"{quantizer.spec.format.name} holds no negative numbers, and the data does",
                where=quantizer.name,
                hint="use a signed format, or an asymmetric one",
            )
    found = {name: observer.result() for name, (_, observer) in observers.items()}
    own = {name: None if h is None else h.amax for name, h in found.items()}
    common: dict[str, Histogram] = {}
    for name, value in reduce_max(own, problem).items():
        if value is not None:  # the bins of all ranks follow from the common amax
            known = found[name]
            amax = value.to(_device(own[name], value))
            common[name] = coarsened(known, amax) if known is not None else empty(amax, bins=bins)
    counts = reduce_sum({name: histogram.counts for name, histogram in common.items()})
    return {
        name: replace(common[name], counts=counts[name]) if name in common else None
        for name in watched
    }


def _device(own: Tensor | None, reduced: Tensor) -> torch.device:
    return own.device if own is not None else reduced.device
