"""Quantized Conv1D, the linear layer of GPT-2 that stores its weight input features first."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from bittern.nn import QuantModule
from bittern.nn.intercept import sealed
from bittern.nn.lowrank import with_branch

__all__ = ["QuantConv1D"]


class QuantConv1D(QuantModule, Conv1D):
    """``y = Q_in(x) @ Q_w(W) + b``; slots ``weight`` of shape ``(in, out)``, ``input``, ``output``.

    Per channel means per output feature, axis 1; groups run along the input features, axis 0.
    """

    branched = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map of the quantized operands, shape ``(..., out)``."""
        rows = self.quantize("input", x).reshape(-1, x.shape[-1])
        weight = self.quantize("weight", self.weight)
        with sealed():  # or attention around it would take a quantized weight for keys
            found = torch.addmm(self.bias, rows, weight)
            found = with_branch(self, x, found, inputs_first=True)
        return self.quantize("output", found.view(*x.shape[:-1], self.nf))
