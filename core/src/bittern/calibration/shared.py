"""One range for what is one tensor, or will be: inputs and fused weights, as the trace knows."""

from __future__ import annotations

import torch
from torch import nn

from bittern.calibration.context import CalibrationContext
from bittern.nn import TensorQuantizer
from bittern.numerics import Range

__all__ = ["raise_global_scales", "share_global_scales", "share_ranges", "union"]


def share_ranges(model: nn.Module, context: CalibrationContext) -> None:
    """Give the inputs that are one tensor one range, the largest of theirs.

    They saw the same data, but not always through the same batches: experts, skipped layers.
    """
    trace = context.trace()
    for group in trace.shared_inputs if trace is not None else ():
        inputs = [q for name in group if (q := context.quantizer(model, name, "input")) is not None]
        for one in inputs:
            own = one.range
            if own is None:
                continue
            alike = (q.range for q in inputs if q.spec == one.spec and q.range is not None)
            same = [values for values in alike if values.amax.shape == own.amax.shape]
            one.set_range(union(own, same))


def share_global_scales(model: nn.Module, context: CalibrationContext) -> None:
    """Give the weights that read one tensor (q, k and v; gate and up) one global scale.

    Engines fuse them into one matrix, which has one global scale, the largest of theirs; block
    scales stay what fits each block. Weights that share their input with nobody are left alone.
    """
    if not any(_two_level(q) for _, q in context.quantizers(model)):
        return
    trace = context.trace()
    for group in trace.shared_inputs if trace is not None else ():
        known = [(name, context.quantizer(model, name, "weight")) for name in group]
        weights = [(name, q) for name, q in known if q is not None]
        found = [q.global_amax for _, q in weights if _two_level(q) and q.global_amax is not None]
        if len({value.shape for value in found}) != 1 or len(found) < 2:
            continue
        largest = torch.stack([value.to(found[0].device) for value in found]).amax(0)
        for name, quantizer in weights:
            own = quantizer.range
            if own is None or own.global_amax is None or torch.equal(own.global_amax, largest):
                continue
            module = model.get_submodule(name)
            with context.access(module, write=False):
                weight = getattr(module, quantizer.tensor or "")
                quantizer.calibrate_on(weight, global_amax=largest.to(own.amax.device))


def raise_global_scales(model: nn.Module, context: CalibrationContext, factor: float) -> None:
    """Multiply all global scales; block scales follow.

    Args:
        model: The converted, calibrated model.
        context: Services.
        factor: Positive.
    """
    for _, module in context.modules(model):
        for quantizer in module.slots().values():
            whole = quantizer.global_amax
            if whole is None or quantizer.spec.constant_amax is not None:
                continue
            if quantizer.tensor is None:
                quantizer.set_range(Range(whole * factor))
            else:
                with context.access(module, write=False):
                    weight = getattr(module, quantizer.tensor)
                    quantizer.calibrate_on(weight, global_amax=whole * factor)


def _two_level(quantizer: TensorQuantizer) -> bool:
    return quantizer.codec.two_level and quantizer.tensor is not None


def union(own: Range, others: list[Range]) -> Range:
    """Return the smallest range that holds all."""
    device = own.amax.device
    high = torch.stack([values.amax.to(device) for values in others]).amax(0)
    if own.amin is None:
        return Range(high)
    lows = [values.amin.to(device) for values in others if values.amin is not None]
    return Range(high, amin=torch.stack(lows).amin(0))
