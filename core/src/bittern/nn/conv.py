"""Quantized nn.Conv1d, nn.Conv2d, nn.Conv3d."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bittern.nn.module import QuantModule

__all__ = ["QuantConv1d", "QuantConv2d", "QuantConv3d"]


class _QuantConv(QuantModule):
    """Convolution of the quantized operands; slots ``weight``, ``input``, ``output``."""

    weight: Tensor
    bias: Tensor | None
    _conv_forward: Any

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution, shape ``(batch, out_channels, ...)``."""
        weight = self.quantize("weight", self.weight)
        found = self._conv_forward(self.quantize("input", input), weight, self.bias)
        return self.quantize("output", found)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """Quantized nn.Conv1d."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """Quantized nn.Conv2d."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """Quantized nn.Conv3d."""
