"""The framework's own operator: a fused activation, opaque to whoever records operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("heron_framework::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(x)``."""
    return x * x.sigmoid()


@swish.register_fake
def _shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    gate = x.sigmoid()
    return gradient * gate * (1 + x * (1 - gate))


swish.register_autograd(_backward, setup_context=_keep)
