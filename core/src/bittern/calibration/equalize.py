"""Equalization: moves scales between layers so that no input column of a weight falls behind.

The columns of a weight that share a scale in a group are rounded alike. Where one of them is small
because what it multiplies is large, rounding it costs as much as that is large. Multiplying column
``j`` of what reads a tensor by ``s[j]``, and dividing what makes the tensor by it, changes nothing
but the ranges. If rounding errors are as large as the columns of a group are on average, the error
of the output is ``(sum_j a[j]^2 / s[j]^2) (sum_j w[j]^2 s[j]^2)``, with ``a[j]`` the magnitude of
the tensor's channel and ``w[j]`` that of the column, and the least at ``s[j] = sqrt(a[j] / w[j])``
(by Cauchy and Schwarz). With a ratio of ranges that is cross-layer equalization (Nagel et al.,
Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, eq. 11).

No data is needed: what makes the tensor is a norm or a linear layer, and ``a[j]`` follows from its
weights as if its inputs were independent, with variance 1. Those of a norm are nearly that. The
columns that are scaled for one tensor are the rows of what makes another, so all of it is repeated
until little moves. Whatever scales a model has grown or was given between two layers, its outliers
for one, then make no difference: the result is the same for all of them.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.moves import check_followed, move, rows_of, tensor_of
from bittern.records import Fold, Member, Plan

__all__ = ["run_equalize"]

log = logging.getLogger("bittern.calibration")

NAME = "equalize"

_LIMIT = 14.0  # 2^14 is about the 1e4 of the implementations of SmoothQuant
_PASSES = 4  # each rounds the weights once more
_LITTLE = 0.1  # of an octave


def run_equalize(
    model: nn.Module, plan: Plan, forward: Forward | None, context: CalibrationContext
) -> None:
    """Equalize the columns of planned weights with what makes their inputs, where that can be.

    The weights are rounded to their dtype once more by it. Where the model cannot be traced
    (without data it needs example inputs, which its adapter may know), nothing happens.

    Args:
        model: The converted model; its weights change, its function does not.
        plan: Its plan.
        forward: Unused: the trace needs shapes only.
        context: Services; gives the trace.

    Raises:
        CalibrationError: No step that sets ranges follows.
    """
    check_followed(NAME, plan)
    trace = context.trace()
    if trace is None:
        log.info("not equalized: there are no example inputs to trace the model on")
        return
    planned = {entry.module for entry in plan.entries if entry.kind == "weight"}
    taken: set[str] = set()
    folds = []
    for fold in trace.foldable:
        readers = {member.module for member in fold.divided}
        if readers <= planned and not taken & set(fold.consumers):
            taken.update(fold.consumers)
            folds.append(fold)
    _remember(model, folds, context)
    for _ in range(_PASSES):
        moved = [_equalize(model, fold, context) for fold in folds]
        if max(moved, default=0.0) < _LITTLE:
            break
    left = sorted(planned - taken)
    if left:
        log.info("not equalized, for want of a producer: %s", ", ".join(left))


def _remember(model: nn.Module, folds: list[Fold], context: CalibrationContext) -> None:
    """Let an error afterwards put back what folds write to."""
    members = (member for fold in folds for member in (*fold.scaled, *fold.divided))
    for module, tensor in dict.fromkeys((m.module, m.tensor) for m in members):
        holder = model.get_submodule(module)
        with context.access(holder, write=True):
            context.remember(holder, tensor)


def _equalize(model: nn.Module, fold: Fold, context: CalibrationContext) -> float:
    """Move the scales of one fold, and return the logarithm of the largest."""
    made = torch.stack([_squares(model, member, context) for member in fold.scaled]).sum(0)
    read = torch.stack([_squares(model, member, context) for member in fold.divided]).sum(0)
    usable = (made > 0) & (read > 0)
    if not bool(usable.any()):
        return 0.0
    exponent = (made.log2() - read.log2()) / 4
    exponent -= exponent[usable].mean()  # sizes stay what they are on average
    exponent = torch.where(usable, exponent, 0).clamp(-_LIMIT, _LIMIT)
    move(model, fold, torch.exp2(exponent).float(), context)
    return float(exponent.abs().max())


def _squares(model: nn.Module, member: Member, context: CalibrationContext) -> Tensor:
    """Return the sum of squares of each coordinate, the mean over its rows, in float64."""
    with context.access(model.get_submodule(member.module), write=False):
        rows = rows_of(tensor_of(model, member), member)
        return rows.double().square().sum(1).mean(1).cpu()
