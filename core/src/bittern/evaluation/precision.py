"""Runs a model in float32 for a while, so that a comparison is not blurred by half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["in_float32"]


@contextmanager
def in_float32(model: nn.Module, *, limit: int = 16 * 10**9) -> Iterator[str]:
    """Hold all weights in float32 while the block runs, unless they would take too much.

    Args:
        model: The model; its half-precision tensors come back bit for bit.
        limit: Bytes of float32 weights beyond which the model stays as it is.

    Yields:
        Name of the dtype the model runs in.
    """
    tensors: dict[int, Tensor] = {
        id(t): t
        for t in (*model.parameters(), *model.buffers())
        if t.is_floating_point() and t.dtype.itemsize == 2
    }
    meta = any(t.device.type == "meta" for t in model.parameters())
    if meta or 4 * sum(t.numel() for t in tensors.values()) > limit:
        first = next(iter(tensors.values()), None)
        yield "float32" if first is None else str(first.dtype).removeprefix("torch.")
        return
    originals = [(t, t.data) for t in tensors.values()]
    try:
        for tensor, original in originals:
            tensor.data = original.to(torch.float32)
        yield "float32"
    finally:
        for tensor, original in originals:
            tensor.data = original
