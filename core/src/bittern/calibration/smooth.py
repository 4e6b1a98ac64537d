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
from bittern.calibration.observe import observe_max
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, TensorQuantizer
from bittern.nn.extremes import Extremes
from bittern.records import Fold, Member, PerChannel, Plan

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
    ranges = observe_max(model, watched, forward, context)
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
            rows = _rows(_tensor(model, member), member).abs().float().amax(1)
            weights = torch.maximum(weights, rows.amax(1).to(weights.device))
    exponent = alpha * inputs.log2() - (1 - alpha) * weights.log2()
    usable = (inputs > 0) & (weights > 0)
    exponent = torch.where(usable, exponent, 0).round().clamp(-_LIMIT, _LIMIT)
    _move(model, fold, exponent, context)
    context.undo.append(partial(_move, model, fold, -exponent, context))  # exact: powers of two


def _move(model: nn.Module, fold: Fold, exponent: Tensor, context: CalibrationContext) -> None:
    """Divide the producer by two to the ``exponent``, and multiply the consumers by it."""
    for members, sign in ((fold.scaled, -1), (fold.divided, 1)):
        for member in members:
            with context.access(model.get_submodule(member.module), write=True):
                _scale(_tensor(model, member), member, sign * exponent)


def _tensor(model: nn.Module, member: Member) -> Tensor:
    found: Tensor = getattr(model.get_submodule(member.module), member.tensor)
    return found


def _rows(tensor: Tensor, member: Member) -> Tensor:
    """Return the member's rows as ``(coordinates, rows, everything else)``."""
    index = member.index.to(tensor.device)
    rows = tensor.detach().movedim(member.dim, 0)[index.flatten()]
    return rows.reshape(*index.shape, -1).transpose(1, 2)


@torch.no_grad()
def _scale(tensor: Tensor, member: Member, exponent: Tensor) -> None:
    """Multiply the member's rows by two to the ``exponent``, in place."""
    index = member.index.to(tensor.device)
    shift = torch.zeros(tensor.shape[member.dim], device=tensor.device)
    shift[index] = exponent.to(tensor.device)[:, None].expand(index.shape)
    shape = [-1 if d == member.dim else 1 for d in range(tensor.dim())]
    tensor.mul_(torch.exp2(shift).reshape(shape).to(tensor.dtype))
