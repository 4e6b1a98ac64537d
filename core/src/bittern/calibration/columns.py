"""Rounding a matrix column by column, each column making up for the errors of those before it.

With ``H`` the Gram matrix of the inputs, errors ``E = Q - W`` cost ``tr(E H E^T)``. Let ``H = U
U^T`` with ``U`` upper triangular, and ``A = U / diag(U)``. Then

    tr(E H E^T) = sum_j U_jj^2 |E_j + sum_{i<j} A_ij E_i|^2,

so column ``j`` is best rounded from ``W_j - sum_{i<j} A_ij E_i``, whatever comes after it. These
are the numbers of GPTQ (Frantar et al., ICLR 2023), which takes ``A`` from the Cholesky factor of
the inverse of ``H``; factoring ``H`` itself from its last row on needs no inverse.

Early columns were rounded before anybody knew the errors of the late ones. All are rounded again,
each from where the cost is least with the others as they are (coordinate descent, as in Behdin et
al., QuantEase, 2023): ``W_j - sum_{i != j} E_i H_ij / H_jj``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factor", "errors_of", "factorize", "refine_columns", "round_columns"]

_TRIES = 8  # dampings, each ten times the one before


@dataclass(frozen=True, eq=False)
class Factor:
    """A factored Gram matrix.

    Attributes:
        unit: ``A``, upper triangular with ones on the diagonal, ``(parts, inputs, inputs)``.
        cost: What an error of a column costs once later columns make up for it, ``U_jj^2``,
            ``(parts, inputs)``.
        damp: The damping that it took.
    """

    unit: Tensor
    cost: Tensor
    damp: float

    def damped(self, matrix: Tensor) -> Tensor:
        """Return the Gram matrix as it was factored."""
        return _damped(matrix, self.damp)


def factorize(matrix: Tensor, *, damp: float) -> Factor | None:
    """Return the factors of Gram matrices, damped until they have some.

    Damping adds a share of its own to every diagonal element: it is the same for inputs in other
    units. An input that was always 0 gets the mean, so that its column is rounded on its own.

    Args:
        matrix: Symmetric, positive semidefinite up to rounding, ``(parts, inputs, inputs)``.
        damp: The share to begin with.

    Returns:
        The factors; ``None`` where no damping up to the largest made the matrix positive.
    """
    for step in range(_TRIES):
        share = damp * 10**step
        lower, info = torch.linalg.cholesky_ex(_damped(matrix, share).flip(-1, -2))
        if not bool(info.any()) and bool(lower.isfinite().all()):
            upper = lower.flip(-1, -2)
            scale = upper.diagonal(dim1=-2, dim2=-1)
            return Factor(upper / scale.unsqueeze(-2), scale.square(), share)
    return None


def _damped(matrix: Tensor, share: float) -> Tensor:
    """Return a copy of Gram matrices with a share of its own added to the diagonal."""
    found = matrix.clone()
    own = found.diagonal(dim1=-2, dim2=-1)
    mean = own.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1)
    own.add_(own * share + torch.where(own <= 0, mean, 0))
    return found


def errors_of(errors: Tensor, matrix: Tensor) -> Tensor:
    """Return ``e H e^T`` of every row of errors.

    Args:
        errors: Shape ``(parts, outputs, inputs)``.
        matrix: Shape ``(parts, inputs, inputs)``.

    Returns:
        Shape ``(parts, outputs)``.
    """
    return (errors @ matrix).mul_(errors).sum(-1)


def round_columns(
    weight: Tensor,
    factor: Factor,
    rounded: Callable[[int, Tensor], Tensor],
    *,
    block: int,
) -> Tensor:
    """Return a matrix with every column rounded.

    Args:
        weight: Float32, ``(parts, outputs, inputs)``.
        factor: Of the Gram matrix of the inputs, in the same order.
        rounded: Rounds column ``j``, ``(parts, outputs)``.
        block: Columns that are brought up to date at once.
    """
    inputs = weight.shape[-1]
    source = weight.transpose(1, 2).contiguous()
    errors = torch.empty_like(source)
    unit = factor.unit.transpose(1, 2).contiguous()  # row j: what column j makes up for
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        wanted = source[:, start:stop]
        if start:
            wanted = torch.baddbmm(wanted, unit[:, start:stop, :start], errors[:, :start], alpha=-1)
        for j in range(start, stop):
            target = wanted[:, j - start : j - start + 1]
            if j > start:
                target = torch.baddbmm(
                    target, unit[:, j : j + 1, start:j], errors[:, start:j], alpha=-1
                )
            errors[:, j] = rounded(j, target[:, 0]) - source[:, j]
    return (source + errors).transpose(1, 2)


def refine_columns(
    weight: Tensor,
    found: Tensor,
    matrix: Tensor,
    rounded: Callable[[int, Tensor], Tensor],
    *,
    block: int,
) -> Tensor:
    """Return a rounded matrix with every column rounded once more, given all others.

    No row costs more than before, but for what float32 makes of it.

    Args:
        weight: Float32, ``(parts, outputs, inputs)``.
        found: Its columns, rounded.
        matrix: Gram matrix of the inputs, ``(parts, inputs, inputs)``; no diagonal element is 0.
        rounded: Rounds column ``j``, ``(parts, outputs)``.
        block: Columns that are brought up to date at once.
    """
    inputs = weight.shape[-1]
    source = weight.transpose(1, 2).contiguous()
    errors = (found - weight).transpose(1, 2).contiguous()
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        pull = matrix[:, start:stop] @ errors
        for j in range(start, stop):
            own = matrix[:, j, j].unsqueeze(-1)
            target = source[:, j] + errors[:, j] - pull[:, j - start] / own
            change = rounded(j, target) - source[:, j] - errors[:, j]
            errors[:, j] += change
            if j + 1 < stop:
                rest = matrix[:, j + 1 : stop, j : j + 1]
                pull[:, j + 1 - start :].baddbmm_(rest, change.unsqueeze(1))
    return (source + errors).transpose(1, 2)
