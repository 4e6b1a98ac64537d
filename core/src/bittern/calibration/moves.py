"""Moves scales between the weights of a model along the folds that the trace finds.

Multiplying the inputs' rows of what reads a tensor by ``s`` and dividing the rows of what makes it
by ``s`` leaves the model's function as it is. Powers of two are exact; others round the weights to
their dtype once more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.errors import CalibrationError
from bittern.records import Fold, Member, Plan

__all__ = ["check_followed", "move", "rows_of", "tensor_of"]


def check_followed(name: str, plan: Plan) -> None:
    """Raise if a step that changes weights is the last one.

    Args:
        name: The step.
        plan: The plan.

    Raises:
        CalibrationError: No step that sets ranges follows.
    """
    if plan.algorithm and plan.algorithm[-1][0] == name:
        raise CalibrationError(
            f"{name} changes weights, and no step after it takes their ranges",
            hint=f"put it first: algorithm: [{name}, max]",
        )


def move(model: nn.Module, fold: Fold, factor: Tensor, context: CalibrationContext) -> None:
    """Multiply the consumers of a fold by a factor, and divide its producer by it.

    Args:
        model: The model.
        fold: Where the factor moves.
        factor: Positive, float32, one per coordinate of the fold.
        context: Gives the weights.
    """
    for members, scale in ((fold.scaled, 1 / factor), (fold.divided, factor)):
        for member in members:
            with context.access(model.get_submodule(member.module), write=True):
                _multiply(tensor_of(model, member), member, scale)


def tensor_of(model: nn.Module, member: Member) -> Tensor:
    """Return the parameter of a member."""
    found: Tensor = getattr(model.get_submodule(member.module), member.tensor)
    return found


def rows_of(tensor: Tensor, member: Member) -> Tensor:
    """Return the member's rows as ``(coordinates, rows, everything else)``."""
    index = member.index.to(tensor.device)
    rows = tensor.detach().movedim(member.dim, 0)[index.flatten()]
    return rows.reshape(*index.shape, -1).transpose(1, 2)


@torch.no_grad()
def _multiply(tensor: Tensor, member: Member, factor: Tensor) -> None:
    """Multiply the member's rows by a factor, in place."""
    index = member.index.to(tensor.device)
    wide = torch.ones(tensor.shape[member.dim], device=tensor.device)
    wide[index] = factor.to(tensor.device)[:, None].expand(index.shape)
    shape = [-1 if d == member.dim else 1 for d in range(tensor.dim())]
    if bool((torch.frexp(wide).mantissa == 0.5).all()):
        tensor.mul_(wide.reshape(shape).to(tensor.dtype))  # exact: powers of two
    else:
        tensor.copy_(tensor.float() * wide.reshape(shape))
