"""The terms of distillation, and which positions of a batch count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bittern.errors import DataError
from bittern.runtime import Batch

__all__ = ["divergence", "predicted", "relative_error", "task_loss", "valid"]

IGNORED = -100  # a label that does not count, as in torch and transformers


def divergence(
    logits: Tensor, truth: Tensor, counted: Tensor | None, *, temperature: float
) -> Tensor:
    """Return ``T^2 KL(truth || logits)`` of the distributions along the last axis, float32.

    The mean over the positions that count, in nats, both sides' logits divided by ``T``; the factor
    keeps gradients the size of those of hard labels (arXiv:1503.02531, section 2).

    Args:
        logits: ``(..., classes)``.
        truth: The same shape, of the teacher.
        counted: Boolean, ``(...)``; ``None``: every position.
        temperature: ``T``.

    Raises:
        DataError: The shapes differ.
    """
    if logits.shape != truth.shape:
        raise DataError(
            f"the student's logits are {tuple(logits.shape)}, the teacher's {tuple(truth.shape)}",
            hint="they must have one vocabulary",
        )
    if counted is not None:  # before float32: what does not count takes no memory
        logits, truth = logits[counted], truth[counted]
    log_q = F.log_softmax(logits.float() / temperature, -1)
    log_p = F.log_softmax(truth.float() / temperature, -1)
    terms = log_p.exp() * (log_p - log_q)
    terms = terms.masked_fill(log_p.isneginf(), 0.0)  # 0 log 0 = 0, for masked classes
    return terms.sum() * temperature**2 / max(terms[..., 0].numel(), 1)


def relative_error(hidden: Tensor, truth: Tensor, counted: Tensor | None) -> Tensor:
    """Return ``sum((hidden - truth)^2) / sum(truth^2)``, float32.

    Args:
        hidden: Hidden states of any shape.
        truth: The same shape, of the teacher.
        counted: Boolean, of the leading dimensions; ``None``: all of them.

    Raises:
        DataError: The shapes differ.
    """
    if hidden.shape != truth.shape:
        raise DataError(
            f"the student's hidden state is {tuple(hidden.shape)}, the teacher's "
            f"{tuple(truth.shape)}",
            hint="compare modules of one width",
        )
    if counted is not None:
        hidden, truth = hidden[counted], truth[counted]
    hidden, truth = hidden.float(), truth.float()
    scale = truth.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (hidden - truth).square().sum() / scale


def task_loss(logits: Tensor, batch: Batch, causal: bool | None) -> Tensor:
    """Return the mean cross-entropy with the batch's labels, or with its next tokens.

    Raises:
        DataError: It has neither.
    """
    labels = _labels(logits, batch)
    shifted = _is_causal(logits, batch, causal)
    if labels is None and shifted:
        labels = batch.ids
    if labels is None:
        raise DataError("the batch has no labels to learn", hint="give them, or task_weight=0")
    if shifted:
        labels, logits = labels[:, 1:], logits[:, :-1]
        if batch.mask is not None:
            keep = (batch.mask[:, 1:] != 0) & (batch.mask[:, :-1] != 0)
            labels = labels.masked_fill(~keep, IGNORED)
    flat, wanted = logits.flatten(0, -2).float(), labels.flatten()
    total = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp_min(1)


def predicted(logits: Tensor, batch: Batch, causal: bool | None) -> Tensor | None:
    """Return which positions of logits count, boolean ``(...)``; ``None``: all of them."""
    counted = valid(logits, batch)
    labels = _labels(logits, batch)
    if labels is None:
        return counted
    has = labels != IGNORED
    if _is_causal(logits, batch, causal):  # position t predicts the label of t + 1
        has = torch.cat([has[:, 1:], torch.zeros_like(has[:, :1])], 1)
    return has if counted is None else counted & has


def valid(hidden: Tensor, batch: Batch) -> Tensor | None:
    """Return which positions of ``(rows, tokens, ..)`` are no padding; ``None``: all of them."""
    mask = batch.mask
    if not isinstance(mask, Tensor) or mask.dim() != 2 or hidden.shape[:2] != mask.shape:
        return None
    return (mask != 0).to(hidden.device)


def _labels(logits: Tensor, batch: Batch) -> Tensor | None:
    found = batch.targets[0] if batch.targets else None
    if not isinstance(found, Tensor) or found.is_floating_point():
        return None
    return found.to(logits.device) if found.shape == logits.shape[:-1] else None


def _is_causal(logits: Tensor, batch: Batch, causal: bool | None) -> bool:
    """Whether each position predicts the next token: as `bittern.evaluate` takes it."""
    ids = batch.ids
    return (
        causal is not False
        and ids is not None
        and logits.dim() == 3
        and logits.shape[:2] == ids.shape
    )
