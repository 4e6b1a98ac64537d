"""Quantized nn.Linear and nn.Embedding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bittern.nn.module import QuantModule

__all__ = ["QuantEmbedding", "QuantLinear"]


class QuantLinear(QuantModule, nn.Linear):
    """``y = Q_in(x) @ Q_w(W)^T + b``; slots ``weight``, ``input``, ``output``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the quantized operands, shape ``(..., out_features)``."""
        weight = self.quantize("weight", self.weight)
        found = F.linear(self.quantize("input", input), weight, self.bias)
        return self.quantize("output", found)


class QuantEmbedding(QuantModule, nn.Embedding):
    """Rows of the quantized table; slots ``weight``, ``output``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings of token ids, shape ``(..., embedding_dim)``."""
        found = F.embedding(
            input,
            self.quantize("weight", self.weight),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        return self.quantize("output", found)
