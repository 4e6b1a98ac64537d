"""Max calibration: every range is the largest magnitude seen.

A weight is reduced once. A tensor that several modules read is reduced once per batch. The data
pass runs the unquantized model, and only when the plan has static activation quantizers. Under
``torch.distributed`` every rank runs its own data and the ranges are the largest over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bittern.calibration.bias import calibrate_biases
from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.coverage import note_experts
from bittern.calibration.observe import observe_max
from bittern.calibration.shared import raise_global_scales, share_global_scales, share_ranges
from bittern.errors import CalibrationError, NumericsError
from bittern.nn import TensorQuantizer
from bittern.records import Plan

__all__ = ["activations_at_max", "fill_unseen", "run_max", "static_activations"]


MOST_HEADROOM = 16  # more would leave block scales of 8 bits too few steps


def run_max(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    share: bool = True,
    headroom: float = 1.0,
) -> None:
    """Set the amax of every static quantizer.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data; ``None`` when there is none.
        context: Services.
        share: Whether the modules that read one tensor get one input range, and one global scale
            of their weights (nvfp4).
        headroom: What the largest magnitude is multiplied with where a global scale follows from it
            (nvfp4): with more than 1, activations may grow beyond the data, and the blocks of a
            weight that hold its largest numbers can be given a larger scale.

    Raises:
        CalibrationError: NaN or Inf in a weight or an activation; names the module and the batch.
            Or ``headroom`` is out of range.
    """
    if not 1 <= headroom <= MOST_HEADROOM:
        raise CalibrationError(
            f"headroom is {headroom}", hint=f"choose it between 1 and {MOST_HEADROOM}"
        )
    _weights(model, context)
    if share:
        share_global_scales(model, context)
    if forward is not None and plan.needs_data:
        activations_at_max(model, static_activations(model, context), forward, context, share=share)
    if headroom != 1:
        raise_global_scales(model, context, headroom)


def _weights(model: nn.Module, context: CalibrationContext) -> None:
    for _, module in context.modules(model):
        weights = [q for q in module.slots().values() if q.tensor is not None]
        if not weights:
            continue
        with context.access(module, write=False):
            for quantizer in weights:
                weight = getattr(module, quantizer.tensor or "").detach()
                try:
                    quantizer.calibrate_on(weight)
                except NumericsError as error:
                    damaged = not bool(weight.float().isfinite().all())
                    raise CalibrationError(
                        "the weight holds NaN or Inf" if damaged else error.what,
                        where=quantizer.name,
                        hint="the checkpoint is damaged; load it again, or skip the module"
                        if damaged
                        else error.hint,
                    ) from error


def static_activations(model: nn.Module, context: CalibrationContext) -> dict[str, TensorQuantizer]:
    """Return the activation quantizers that data has to calibrate, by name."""
    return {
        name: quantizer
        for name, quantizer in context.quantizers(model)
        if quantizer.tensor is None
        and not quantizer.spec.dynamic
        and quantizer.spec.constant_amax is None
    }


def fill_unseen(values: Tensor) -> Tensor:
    """Give the experts that saw no token the largest range of the others, shape ``(.., experts)``.

    A range of 0 would become the scale 1, which has nothing to do with the layer's numbers.
    """
    unseen = (values == 0).all(dim=0) if values.dim() > 1 else values == 0
    return torch.where(unseen, values.amax(dim=-1, keepdim=True), values)


def activations_at_max(
    model: nn.Module,
    quantizers: Mapping[str, TensorQuantizer],
    forward: Forward,
    context: CalibrationContext,
    *,
    biases: bool = True,
    share: bool = True,
) -> None:
    """Run the data once and give each quantizer the largest magnitude it saw.

    Args:
        model: The converted model.
        quantizers: Static activation quantizers by name.
        forward: Runs the data.
        context: Services.
        biases: Whether static biases are still to be found, in a pass before.
        share: Whether inputs that are one tensor get one range.

    Raises:
        CalibrationError: NaN or Inf in an activation; names the quantizer and the batch.
    """
    if biases:
        calibrate_biases(model, forward, context)
    watched = {name: (q, q.extremes) for name, q in quantizers.items()}
    found = observe_max(model, watched, forward, context)
    for name, value in found.values.items():
        if value is not None:
            quantizer = quantizers[name]
            if quantizer.per_expert:
                seen = (value != 0).reshape(-1, value.shape[-1]).any(0)
                note_experts(
                    context, name, seen, instead="they get the largest range of the others"
                )
            filled = fill_unseen(value) if quantizer.per_expert else value
            quantizer.set_range(quantizer.extremes.range_of(filled))
    if share and not found.alike:  # else they are equal, and the model needs no trace
        share_ranges(model, context)
