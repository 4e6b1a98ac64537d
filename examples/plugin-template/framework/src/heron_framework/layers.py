"""The framework's own linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron_framework.ops import swish

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "swish": swish}


class Linear(nn.Module):
    """A linear map with its activation: ``y = act(x W^T + b)``."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, activation: str = "none"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def activate(self, x: Tensor) -> Tensor:
        """Return ``act(x)``."""
        return ACTIVATIONS[self.activation](x)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)``."""
        return self.activate(F.linear(x, self.weight, self.bias))
