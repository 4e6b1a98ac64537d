"""The quantized modules: mixins that Bittern puts in front of a live module's own class.

The module keeps its parameters, its names and its place in the model. A slot without a quantizer
passes its tensor unchanged, so that with all of them off a model computes what it always did.
"""

from __future__ import annotations

import torch.nn.functional as F
from bittern.nn import QuantModule
from torch import Tensor

from heron_framework.attention import DotProduct
from heron_framework.layers import Linear


class QuantLinear(QuantModule, Linear):
    """``y = act(Q_in(x) @ Q_w(W)^T + b)``; slots ``weight``, ``input``, ``output``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized linear map, shape ``(..., out_features)``."""
        weight = self.quantize("weight", self.weight)
        found = F.linear(self.quantize("input", x), weight, self.bias)
        return self.quantize("output", self.activate(found))


class QuantDotProduct(QuantModule, DotProduct):
    """Attention whose operands are quantized; slots ``query``, ``key``, ``value``."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention's mixture of values, shape ``(..., tokens, width)``."""
        return super().forward(
            self.quantize("query", query),
            self.quantize("key", key),
            self.quantize("value", value),
        )
