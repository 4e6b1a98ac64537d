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

__all__ = ["LossFunction", "divergence", "loss_of", "places_of"]

# Of a model's output and the batch; the sum over all samples or tokens, not their mean.
LossFunction = Callable[[Any, Batch], Tensor]


def loss_of(output: Any, batch: Batch, adapter: ModelAdapter, *, index: int) -> Tensor:
    """Return the summed cross-entropy of what a model predicts.

    Against the class labels of the batch, where it has some; else against classes (next tokens)
    that are drawn from the model's own distribution. The gradients of the latter are those of the
    Fisher information (Martens 2020, New insights and perspectives on the natural gradient method),
    which is the Hessian of the divergence from the unquantized model; and they need no labels.

    Args:
        output: The model's output.
        batch: Its batch.
        adapter: Finds the logits.
        index: Number of the batch; the seed of what is drawn.

    Raises:
        DataError: The model's output is no floating-point tensor.
    """
    logits = logits_of(output, adapter)
    if not logits.is_floating_point() or logits.dim() == 0:
        raise DataError(
            "the model's output has no classes to predict",
            hint="give loss=, a function of the output and the batch",
        )
    rows = logits.reshape(-1, logits.shape[-1])
    keep = places_of(logits, batch).reshape(-1)
    label = batch.targets[0] if batch.targets else None
    if (
        isinstance(label, Tensor)
        and not label.is_floating_point()
        and label.shape == logits.shape[:-1]
        and batch.ids is None  # those of a language model are its input once more
    ):
        classes = label.reshape(-1)
        keep = keep & (classes != -100)
    else:
        classes = _drawn(rows.detach(), index)
    losses = F.cross_entropy(rows.float(), classes.clamp(min=0), reduction="none")
    return torch.where(keep, losses, 0.0).sum()


def places_of(logits: Tensor, batch: Batch) -> Tensor:
    """Return which of the predictions count, shape ``logits.shape[:-1]``: no padding."""
    mask = batch.mask
    if mask is not None and mask.shape == logits.shape[:-1]:
        return mask != 0
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """Draw a class per row from the softmax of logits (the Gumbel trick), always the same ones."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    found = [  # row by row: the noise of a whole batch is gigabytes
        (
            part.float()
            - torch.empty_like(part, dtype=torch.float32).exponential_(generator=generator).log()
        ).argmax(-1)
        for part in torch.split(logits, 256)
    ]
    return torch.cat(found)


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
