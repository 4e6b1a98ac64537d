"""The probe of a language model: a few rows of tokens and their losses, recorded at export."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bittern.evaluation import folded_weights, in_float32, logits_of, token_nll
from bittern.exporting.record import Probe
from bittern.records import ModelAdapter
from bittern.runtime import evaluating, prepare

__all__ = ["make_probe"]

ROWS, TOKENS = 4, 256


def make_probe(model: nn.Module, adapter: ModelAdapter, data: Any = None) -> Probe | None:
    """Run a few rows through the fake-quantized model.

    Args:
        model: The converted, calibrated model.
        adapter: Gives the vocabulary; without one there is no probe.
        data: Batches to take rows from; random ids where there are none.

    Returns:
        The probe, or ``None`` for a model that is no language model.
    """
    if adapter.vocab_size is None or not adapter.causal:
        return None
    ids = _rows(data, adapter.vocab_size)
    with evaluating(model), in_float32(model) as dtype, folded_weights(model):
        batch = prepare({"input_ids": ids}, model, adapter, index=0)
        logits = logits_of(batch.run(model), adapter)
        assert batch.ids is not None
        if logits.dim() != 3 or logits.shape[:2] != batch.ids.shape:
            return None
        nll = token_nll(logits, batch.ids)
    mean = float(nll.double().mean())
    return Probe(ids.tolist(), nll.cpu().tolist(), math.exp(min(mean, 700.0)), dtype)


def _rows(data: Any, vocab_size: int) -> Tensor:
    """Return up to ``ROWS`` rows of one length; seeded random ids if the data has none."""
    rows: list[Tensor] = []
    if isinstance(data, Iterable) and not isinstance(data, Iterator):
        for raw in data:
            ids = raw.get("input_ids") if isinstance(raw, Mapping) else raw
            ids = ids[0] if isinstance(ids, tuple | list) else ids
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
                break
            rows += [row[:TOKENS].cpu() for row in ids if not rows or len(row) >= len(rows[0])]
            if len(rows) >= ROWS:
                break
    if rows and len(rows[0]) > 1:
        return torch.stack([row[: len(rows[0])] for row in rows[:ROWS]])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (ROWS, 64), generator=generator)
