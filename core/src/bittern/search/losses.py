"""What a model is asked for when its sensitivity is measured: its loss, its distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bittern.errors import DataError
from bittern.evaluation import logits_of
from bittern.records import ModelAdapter
from bittern.runtime import Batch

__all__ = ["LossFunction", "distance", "divergence", "loss_of", "places_of"]

IGNORED = -100  # the class of what does not count, as in torch
OTHERWISE = 'give targets beside the inputs, or loss=; or use method="layer"'

# Of a model's output and the batch; the sum over all samples or tokens, not their mean.
LossFunction = Callable[[Any, Batch], Tensor]


def loss_of(
    output: Any, batch: Batch, adapter: ModelAdapter, *, index: int
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of what a model predicts, and the number of predictions.

    Cross-entropy against the class labels of the batch, where it has some; else against classes
    (next tokens) that are drawn from the model's own distribution. The gradients of the latter are
    those of the Fisher information (Martens 2020, New insights and perspectives on the natural
    gradient method), which is the Hessian of the divergence from the unquantized model; and they
    need no labels. Where the targets are numbers, the model's distribution is a normal one of unit
    variance around its output, and likewise drawn from.

    Args:
        output: The model's output.
        batch: Its batch.
        adapter: Finds the logits.
        index: Number of the batch; the seed of what is drawn.

    Raises:
        DataError: The model's output is nothing that can be predicted.
    """
    logits, label = _predictions(output, batch, adapter)
    keep = places_of(logits, batch)
    if label is not None and label.is_floating_point():
        residual = _noise(logits).normal_(generator=_generator(logits, index))
        return torch.where(keep, (residual * logits.float()).sum(-1), 0.0).sum(), keep.sum()
    rows = logits.reshape(-1, logits.shape[-1])
    classes = label.reshape(-1) if label is not None else _drawn(rows.detach(), index)
    keep = keep.reshape(-1) & (classes != IGNORED)
    losses = F.cross_entropy(rows.float(), classes.clamp(min=0), reduction="none")
    return torch.where(keep, losses, 0.0).sum(), keep.sum()


def distance(truth: Any, output: Any, batch: Batch, adapter: ModelAdapter) -> tuple[Tensor, Tensor]:
    """Return how far a model's predictions are from those of the unquantized model, in nats.

    Args:
        truth: The output of the unquantized model.
        output: That of the quantized one.
        batch: Their batch.
        adapter: Finds the logits.

    Returns:
        The divergence of each prediction, or half of the squared difference where the targets are
        numbers; and which of the predictions count.

    Raises:
        DataError: The model's output is nothing that can be predicted.
    """
    p, label = _predictions(truth, batch, adapter)
    q, _ = _predictions(output, batch, adapter)
    if label is not None and label.is_floating_point():
        return (q.float() - p.float()).square().sum(-1) / 2, places_of(p, batch)
    return divergence(p, q), places_of(p, batch)


def _predictions(output: Any, batch: Batch, adapter: ModelAdapter) -> tuple[Tensor, Tensor | None]:
    """Return what a model predicts, classes or numbers along the last axis, and the targets."""
    logits = logits_of(output, adapter)
    if not logits.is_floating_point() or logits.dim() == 0:
        raise DataError("the model's output has no classes to predict", hint=OTHERWISE)
    label = batch.targets[0] if batch.targets else None
    if not isinstance(label, Tensor) or _is_input(label, batch, adapter):
        label = None
    elif label.is_floating_point():
        label = label if label.shape == logits.shape else None
    elif label.dim() > 1 and label.shape == (logits.shape[0], *logits.shape[2:]):
        logits = logits.movedim(1, -1)  # of every pixel
    elif label.shape != logits.shape[:-1]:
        label = None
    if label is None and logits.shape[-1] == 1:
        raise DataError(
            "the model's output is one number, and there are no targets of its shape",
            hint=OTHERWISE,
        )
    return logits, label


def _is_input(label: Tensor, batch: Batch, adapter: ModelAdapter) -> bool:
    """Whether labels are a language model's input once more, to be shifted by somebody."""
    ids = batch.ids
    return ids is not None and label.shape == ids.shape and adapter.causal is not False


def places_of(logits: Tensor, batch: Batch) -> Tensor:
    """Return which of the predictions count, shape ``logits.shape[:-1]``: no padding."""
    mask = batch.mask
    if mask is not None and mask.shape == logits.shape[:-1]:
        return mask != 0
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """Draw a class per row from the softmax of logits (the Gumbel trick), always the same ones."""
    generator = _generator(logits, seed)
    found = [  # part by part: the noise of a whole batch is gigabytes
        (part.float() - _noise(part).exponential_(generator=generator).log()).argmax(-1)
        for part in torch.split(logits, 256)
    ]
    return torch.cat(found)


def _noise(like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.float32)


def _generator(like: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)


def divergence(reference: Tensor, quantized: Tensor) -> Tensor:
    """Return KL(reference || quantized) of the distributions along the last axis, in nats.

    With ``x = logits_q - logits_p`` less its mean under ``p``, the divergence is
    ``log(1 + E_p[exp(x) - 1 - x])``: no difference of two large numbers, so that float32 suffices
    for a divergence of 1e-8.

    Args:
        reference: Logits ``(..., classes)``.
        quantized: Logits of the same shape.

    Returns:
        Shape ``(...)``, float32.
    """
    found = []
    classes = reference.shape[-1]
    rows = (torch.split(t.reshape(-1, classes), 512) for t in (reference, quantized))
    for p, q in zip(*rows, strict=True):
        log_p = F.log_softmax(p.float(), -1)
        masked = log_p.isneginf()  # 0 log 0 = 0, for classes that are ruled out
        weight = log_p.exp()
        difference = torch.where(masked, 0.0, q.float() - p.float())
        x = difference - (weight * difference).sum(-1, keepdim=True)
        found.append((weight * (x.expm1() - x)).sum(-1).clamp(min=0).log1p())
    return torch.cat(found).reshape(reference.shape[:-1])
