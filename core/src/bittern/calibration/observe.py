"""One data pass that collects the largest magnitudes of what quantizers see."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.reduce import reduce_max
from bittern.errors import CalibrationError
from bittern.nn import TensorQuantizer, named_quantizers
from bittern.nn.observer import MaxObserver
from bittern.records import Granularity

__all__ = ["observe_max"]


def observe_max(
    model: nn.Module,
    watched: Mapping[str, tuple[TensorQuantizer, Granularity]],
    forward: Forward,
    context: CalibrationContext,
) -> dict[str, Tensor | None]:
    """Run the unquantized model over the data and return the largest magnitudes.

    Args:
        model: The converted model.
        watched: Name to an activation quantizer and the granularity of its statistics.
        forward: Runs the data.
        context: Services.

    Returns:
        Name to the amax over all batches and ranks, ``None`` where no data came by.

    Raises:
        CalibrationError: NaN or Inf in an activation; names the quantizer and the batch.
    """
    were_on = [q for _, q in named_quantizers(model) if q.enabled]
    try:
        for quantizer in were_on:  # statistics are those of the unquantized model
            quantizer.enabled = False
        for quantizer, granularity in watched.values():
            quantizer.observer = MaxObserver(granularity, context.shared, name=quantizer.name)
        forward()
        observed = {name: (q, q.observer) for name, (q, _) in watched.items()}
    finally:
        for quantizer, _ in watched.values():
            quantizer.observer = None
        for quantizer in were_on:
            quantizer.enabled = True
    found: dict[str, Tensor | None] = {}
    problem: CalibrationError | None = None
    for name, (quantizer, observer) in observed.items():
        assert observer is not None
        bad = observer.first_bad_batch()
        if bad is not None and problem is None:
            problem = CalibrationError(
                f"the activations hold NaN or Inf in batch {bad}",
                where=quantizer.name,
                hint="run that batch through the unquantized model in a wider dtype "
                "(--dtype float32), or leave it out",
            )
        found[name] = observer.result()
    reduced = reduce_max(found, problem)
    return {
        name: None if value is None else value.to(_device(found[name], value))
        for name, value in reduced.items()
    }


def _device(own: Tensor | None, reduced: Tensor) -> torch.device:
    return own.device if own is not None else reduced.device
