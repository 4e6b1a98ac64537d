"""Sums on the device from which the metrics are made; read once at the end."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Divergence", "NextToken", "Sqnr", "TopOne", "token_nll"]


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the next-token negative log-likelihood, ``(rows, tokens - 1)``, float32, in nats.

    Args:
        logits: ``(rows, tokens, vocab)``.
        ids: ``(rows, tokens)``.
    """
    rows = [  # row by row: a whole batch of log-softmax in float32 is gigabytes
        F.cross_entropy(logits[i, :-1].float(), ids[i, 1:], reduction="none")
        for i in range(len(ids))
    ]
    return torch.stack(rows)


class NextToken:
    """Mean next-token cross-entropy over rows taken as independent sequences."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count: Tensor | int = 0

    def add(self, logits: Tensor, ids: Tensor, mask: Tensor | None) -> None:
        """Take in ``(rows, tokens, vocab)`` logits; masked targets do not count."""
        nll = token_nll(logits, ids)
        keep = torch.ones_like(nll, dtype=torch.bool)
        if mask is not None:
            keep = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        self._sum = self._sum + torch.where(keep, nll, 0.0).double().sum()  # Inf * 0 is NaN
        self._count = self._count + keep.sum()  # int64: float32 stops counting at 2^24

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(self._count)

    @property
    def perplexity(self) -> float | None:
        """``exp`` of the mean; ``None`` without tokens."""
        if not self.tokens:
            return None
        mean = float(self._sum) / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


class TopOne:
    """Share of right top-1 classes."""

    def __init__(self) -> None:
        self._right: Tensor | int = 0
        self._count = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in ``(..., classes)`` logits and ``(...)`` integer labels; -100 does not count."""
        keep = labels != -100
        self._right = self._right + ((logits.argmax(-1) == labels) & keep).sum()
        self._count += int(keep.sum())

    @property
    def accuracy(self) -> float | None:
        """Between 0 and 1; ``None`` without labels."""
        return int(self._right) / self._count if self._count else None


class Divergence:
    """Mean KL(reference || quantized) of the distributions along the last axis, in nats."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, reference: Tensor, quantized: Tensor) -> None:
        """Take in logits of the same shape."""
        ours, theirs = (t.reshape(-1, *t.shape[-2:]) for t in (quantized, reference))
        for q, p in zip(ours, theirs, strict=True):
            log_p = F.log_softmax(p.double(), -1)  # a KL of 1e-5 drowns in float32's rounding
            log_q = F.log_softmax(q.double(), -1)
            terms = log_p.exp() * (log_p - log_q)
            terms = torch.where(log_p.isneginf(), 0.0, terms)  # 0 log 0 = 0, for masked classes
            self._sum = self._sum + terms.sum()
        self._count += reference.numel() // reference.shape[-1]

    @property
    def mean(self) -> float | None:
        """``None`` without data."""
        return max(float(self._sum) / self._count, 0.0) if self._count else None


class Sqnr:
    """Signal to quantization noise: ``10 log10(sum(y^2) / sum((y_q - y)^2))``."""

    def __init__(self) -> None:
        self._signal: Tensor | float = 0.0
        self._noise: Tensor | float = 0.0
        self._seen = False

    def add(self, reference: Tensor, quantized: Tensor) -> None:
        """Take in two tensors of the same shape."""
        reference = reference.float()
        self._signal = self._signal + reference.square().sum().double()
        self._noise = self._noise + (quantized.float() - reference).square().sum().double()
        self._seen = True

    @property
    def db(self) -> float | None:
        """Decibels; ``inf`` where nothing was lost, ``None`` without data."""
        if not self._seen:
            return None
        signal, noise = float(self._signal), float(self._noise)
        if noise == 0:
            return math.inf
        return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
