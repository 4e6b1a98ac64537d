"""One range for the inputs that are one tensor, as the trace knows them."""

from __future__ import annotations

import torch
from torch import nn

from bittern.calibration.context import CalibrationContext
from bittern.nn import QuantModule, TensorQuantizer

__all__ = ["share_ranges"]


def share_ranges(model: nn.Module, context: CalibrationContext) -> None:
    """Give the inputs that are one tensor one range, the largest of theirs.

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
