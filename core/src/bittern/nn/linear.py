"""Quantized nn.Linear and nn.Bilinear."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bittern.nn.lowrank import with_branch
from bittern.nn.module import QuantModule

__all__ = ["QuantBilinear", "QuantLinear"]


class QuantLinear(QuantModule, nn.Linear):
    """``y = Q_in(x) @ Q_w(W)^T + b``; slots ``weight``, ``input``, ``output``."""

    branched = True

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the quantized operands, shape ``(..., out_features)``."""
        weight = self.quantize("weight", self.weight)
        found = F.linear(self.quantize("input", input), weight, self.bias)
        return self.quantize("output", with_branch(self, input, found))


class QuantBilinear(QuantModule, nn.Bilinear):
    """``y_k = Q_1(x1) @ Q_w(W_k) @ Q_2(x2) + b_k``.

    Slots ``weight``, ``input1``, ``input2``, ``output``.
    """

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Return the bilinear map of the quantized operands, shape ``(..., out_features)``."""
        found = F.bilinear(
            self.quantize("input1", input1),
            self.quantize("input2", input2),
            self.quantize("weight", self.weight),
            self.bias,
        )
        return self.quantize("output", found)
