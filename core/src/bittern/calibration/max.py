"""Max calibration: every range is the largest magnitude seen.

A weight is reduced once. A tensor that several modules read is reduced once per batch. The data
pass runs the unquantized model, and only when the plan has static activation quantizers. Under
``torch.distributed`` every rank runs its own data and the ranges are the largest over all ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.observe import observe_max
from bittern.errors import CalibrationError, NumericsError
from bittern.nn import QuantModule, TensorQuantizer, named_quant_modules, named_quantizers
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
    static = {
        name: (q, q.spec.granularity)
        for name, q in named_quantizers(model)
        if q.tensor is None and not q.spec.dynamic
    }
    found = observe_max(model, static, forward, context)
    for name, value in found.items():
        if value is not None:
            static[name][0].set_amax(value)
    _share(model, context)


def _share(model: nn.Module, context: CalibrationContext) -> None:
    """Give the inputs that are one tensor one range.

    They saw the same data, but not always through the same batches: experts, skipped layers.
    """
    trace = context.trace()
    for group in trace.shared_inputs if trace is not None else ():
        inputs = [q for name in group if (q := _input(model, name)) is not None]
        for one in inputs:
            own = one.amax
            if own is None:
                continue
            alike = (q.amax for q in inputs if q.spec == one.spec and q.amax is not None)
            same = [amax.to(own.device) for amax in alike if amax.shape == own.shape]
            one.set_amax(torch.stack(same).amax(0))


def _input(model: nn.Module, name: str) -> TensorQuantizer | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a tensor of a module with several
        return None
    return module.quantizer("input") if isinstance(module, QuantModule) else None
