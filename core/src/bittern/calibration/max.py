"""Max calibration: every range is the largest magnitude seen.

A weight is reduced once. A tensor that several modules read is reduced once per batch. The data
pass runs the unquantized model, and only when the plan has static activation quantizers. Under
``torch.distributed`` every rank runs its own data and the ranges are the largest over all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.reduce import reduce_max
from bittern.errors import CalibrationError, NumericsError
from bittern.nn import named_quant_modules, named_quantizers
from bittern.nn.observer import MaxObserver
from bittern.numerics import amax
from bittern.records import Plan

__all__ = ["run_max"]


def run_max(
    model: nn.Module, plan: Plan, forward: Forward | None, context: CalibrationContext
) -> None:
    """Set the amax of every static quantizer.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data; ``None`` when there is none.
        context: Services.

    Raises:
        CalibrationError: NaN or Inf in a weight or an activation; names the module and the batch.
    """
    _weights(model, context)
    if forward is not None and plan.needs_data:
        _activations(model, forward, context)


def _weights(model: nn.Module, context: CalibrationContext) -> None:
    for _, module in named_quant_modules(model):
        weights = [q for q in module.slots().values() if q.tensor is not None]
        if not weights:
            continue
        with context.access(module, write=False):
            for quantizer in weights:
                weight = getattr(module, quantizer.tensor or "").detach()
                try:
                    value = amax(weight, quantizer.spec.granularity)
                except NumericsError as error:
                    raise CalibrationError(
                        error.what, where=quantizer.name, hint=error.hint
                    ) from error
                try:
                    quantizer.set_amax(value)
                except NumericsError as error:
                    raise CalibrationError(
                        "the weight holds NaN or Inf",
                        where=quantizer.name,
                        hint="the checkpoint is damaged; load it again, or skip the module",
                    ) from error


def _activations(model: nn.Module, forward: Forward, context: CalibrationContext) -> None:
    quantizers = [q for _, q in named_quantizers(model)]
    static = [q for q in quantizers if q.tensor is None and not q.spec.dynamic]
    were_on = [q for q in quantizers if q.enabled]
    try:
        for quantizer in were_on:  # statistics are those of the unquantized model
            quantizer.enabled = False
        for quantizer in static:
            quantizer.observer = MaxObserver(
                quantizer.spec.granularity, context.shared, name=quantizer.name
            )
        forward()
        observed = [(q, q.observer) for q in static]
    finally:
        for quantizer in static:
            quantizer.observer = None
        for quantizer in were_on:
            quantizer.enabled = True
    found: dict[str, Tensor | None] = {}
    problem: CalibrationError | None = None
    for quantizer, observer in observed:
        assert observer is not None
        bad = observer.first_bad_batch()
        if bad is not None and problem is None:
            problem = CalibrationError(
                f"the activations hold NaN or Inf in batch {bad}",
                where=quantizer.name,
                hint="run that batch through the unquantized model in a wider dtype "
                "(--dtype float32), or leave it out",
            )
        found[quantizer.name] = observer.result()
    reduced = reduce_max(found, str(problem) if problem is not None else None)
    if problem is not None:
        raise problem
    for quantizer, _ in observed:
        value = reduced[quantizer.name]
        if value is not None:
            quantizer.set_amax(value.to(_device(found[quantizer.name], value)))


def _device(own: Tensor | None, reduced: Tensor) -> torch.device:
    return own.device if own is not None else reduced.device
