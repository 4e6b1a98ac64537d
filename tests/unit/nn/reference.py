"""Plain references: what int8 makes of a tensor, and layers with given weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = {"format": "int8", "granularity": "channel"}
TENSOR = {"format": "int8", "granularity": "tensor"}


def int8(x: Tensor, axis: int | None = None, *, amax: Tensor | None = None) -> Tensor:
    """Return what signed 8-bit integers keep of ``x``.

    Args:
        x: Any tensor.
        axis: One scale per index of it; one for everything by default.
        amax: Largest magnitude, where it is not that of ``x``.
    """
    x = x.detach()
    if amax is None:
        others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
        amax = x.abs().amax(others, keepdim=True) if others else x.abs()
    scale = torch.where(amax == 0, torch.ones(()), amax / 127)
    return (x / scale).clamp(-128, 127).round() * scale + 0.0


def with_weights(module: nn.Module, **weights: Tensor) -> Any:
    """Return a copy of a module of torch with other values in its parameters."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in weights.items():
            getattr(twin, name).copy_(value)
    return twin
