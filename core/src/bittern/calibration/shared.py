"""One range for the inputs that are one tensor, as the trace knows them."""

from __future__ import annotations

import torch
from torch import nn

from bittern.calibration.context import CalibrationContext
from bittern.nn import QuantModule, TensorQuantizer
from bittern.numerics import Range

__all__ = ["share_ranges"]


def share_ranges(model: nn.Module, context: CalibrationContext) -> None:
    """Give the inputs that are one tensor one range, the largest of theirs.

    They saw the same data, but not always through the same batches: experts, skipped layers.
    """
    trace = context.trace()
    for group in trace.shared_inputs if trace is not None else ():
        inputs = [q for name in group if (q := _input(model, name)) is not None]
        for one in inputs:
            own = one.range
            if own is None:
                continue
            alike = (q.range for q in inputs if q.spec == one.spec and q.range is not None)
            same = [values for values in alike if values.amax.shape == own.amax.shape]
            one.set_range(_union(own, same))


def _union(own: Range, others: list[Range]) -> Range:
    """Return the smallest range that holds all."""
    device = own.amax.device
    high = torch.stack([values.amax.to(device) for values in others]).amax(0)
    if own.amin is None:
        return Range(high)
    lows = [values.amin.to(device) for values in others if values.amin is not None]
    return Range(high, amin=torch.stack(lows).amin(0))


def _input(model: nn.Module, name: str) -> TensorQuantizer | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a tensor of a module with several
        return None
    return module.quantizer("input") if isinstance(module, QuantModule) else None
