"""Max calibration: every range is the largest magnitude seen.

A weight is reduced once. A tensor that several modules read is reduced once per batch. The data
pass runs the unquantized model, and only when the plan has static activation quantizers. Under
``torch.distributed`` every rank runs its own data and the ranges are the largest over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.observe import observe_max
from bittern.calibration.shared import share_ranges
from bittern.errors import CalibrationError, NumericsError
from bittern.nn import TensorQuantizer, named_quant_modules, named_quantizers
from bittern.numerics import amax
from bittern.records import Plan

__all__ = ["activations_at_max", "run_max", "static_activations"]


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
        activations_at_max(model, static_activations(model), forward, context)


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


def static_activations(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Return the activation quantizers that data has to calibrate, by name."""
    return {n: q for n, q in named_quantizers(model) if q.tensor is None and not q.spec.dynamic}


def activations_at_max(
    model: nn.Module,
    quantizers: Mapping[str, TensorQuantizer],
    forward: Forward,
    context: CalibrationContext,
) -> None:
    """Run the data once and give each quantizer the largest magnitude it saw.

    Args:
        model: The converted model.
        quantizers: Static activation quantizers by name.
        forward: Runs the data.
        context: Services.

    Raises:
        CalibrationError: NaN or Inf in an activation; names the quantizer and the batch.
    """
    watched = {name: (q, q.spec.granularity) for name, q in quantizers.items()}
    for name, value in observe_max(model, watched, forward, context).items():
        if value is not None:
            quantizers[name].set_amax(value)
    share_ranges(model, context)
