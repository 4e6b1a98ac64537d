"""SmoothQuant: moves the spread of activations into weights, where it costs less.

Linears that quantize their inputs suffer from single channels much larger than the others. Dividing
channel ``j`` of the input by ``s[j] = amax(x[j])^a / amax(w[:, j])^(1 - a)`` and multiplying the
weight's column by it changes nothing but the ranges (Xiao et al., SmoothQuant, ICML 2023, eq. 4).
The division is folded into whatever makes the input: the trace finds producers where that is legal,
in any architecture. Scales are powers of two, so that folding rounds no weight: the unquantized
model computes what it did, bit for bit but for underflow.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.moves import move, rows_of, tensor_of
from bittern.calibration.observe import observe_max
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, TensorQuantizer
from bittern.nn.extremes import Extremes
from bittern.records import Fold, PerChannel, Plan

__all__ = ["run_smooth"]

log = logging.getLogger("bittern.calibration")

_LIMIT = 14  # 2^14 is about the 1e4 of the reference implementations


def run_smooth(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    alpha: float = 0.8,
) -> None:
    """Smooth the inputs of all quantized linears whose producers can take the scale.

    Args:
        model: The converted model; its weights change, its function does not.
        plan: Its plan.
        forward: Runs the data.
        context: Services; gives the trace.
        alpha: How much of the spread moves into the weights, from 0 to 1.

    Raises:
        CalibrationError: ``alpha`` is out of range, there is no trace, or NaN or Inf was met.
    """
    if not 0 <= alpha <= 1:
        raise CalibrationError(f"alpha is {alpha}", hint="choose alpha between 0 and 1")
    trace = context.trace()
    if trace is None or forward is None:
        raise CalibrationError(
            "smoothing needs a batch that the model can be traced on",
            hint="give the data as a list, a DataLoader or a path, not as a function or iterator",
        )
    folds = [fold for fold in trace.foldable if _quantized(fold, model)]
    axes = {e.module: e.slot_rule.channel_axis for e in plan.entries if e.slot == "input"}
    watched: dict[str, tuple[TensorQuantizer, Extremes]] = {}
    for fold in folds:  # the consumers of a fold read one tensor
        first = fold.consumers[0]
        watched[first] = (_input(model, first), Extremes(PerChannel(axes[first])))
    ranges = observe_max(model, watched, forward, context).values
    taken: set[str] = set()
    for fold in folds:
        amax = ranges[fold.consumers[0]]
        if amax is not None and not taken & set(fold.consumers):
            taken.update(fold.consumers)
            _smooth(model, fold, amax.flatten(), context, alpha=alpha)
    left = [module for module in axes if module not in taken]
    if left:
        log.info("not smoothed, for want of a producer: %s", ", ".join(left))


def _quantized(fold: Fold, model: nn.Module) -> bool:
    """Return whether all consumers are modules with one weight that quantize their input."""
    names = [member.module for member in fold.divided]
    if names != list(fold.consumers):  # a tensor of a module with several
        return False
    modules = [model.get_submodule(name) for name in names]
    return all(isinstance(m, QuantModule) and m.quantizer("input") is not None for m in modules)


def _input(model: nn.Module, name: str) -> TensorQuantizer:
    module = model.get_submodule(name)
    assert isinstance(module, QuantModule)
    quantizer = module.quantizer("input")
    assert quantizer is not None
    return quantizer


def _smooth(
    model: nn.Module, fold: Fold, amax: Tensor, context: CalibrationContext, *, alpha: float
) -> None:
    """Fold one scale."""
    inputs = amax.float()[fold.divided[0].index.to(amax.device)].amax(1)
    weights = torch.zeros_like(inputs)
    for member in fold.divided:
        with context.access(model.get_submodule(member.module), write=False):
            rows = rows_of(tensor_of(model, member), member).abs().float().amax(1)
            weights = torch.maximum(weights, rows.amax(1).to(weights.device))
    exponent = alpha * inputs.log2() - (1 - alpha) * weights.log2()
    usable = (inputs > 0) & (weights > 0)
    exponent = torch.where(usable, exponent, 0).round().clamp(-_LIMIT, _LIMIT)
    move(model, fold, torch.exp2(exponent), context)
    back = torch.exp2(-exponent)
    context.undo.append(partial(move, model, fold, back, context))  # exact: powers of two
