"""Quantized nn.Conv1d to nn.Conv3d and nn.ConvTranspose1d to nn.ConvTranspose3d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bittern.nn.module import QuantModule
from bittern.records import Slot

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "transposed_slots",
]


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


class _QuantConvTranspose(QuantModule):
    """Transposed convolution of the quantized operands; slots ``weight``, ``input``, ``output``."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Any
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    _output_padding: Any
    _convolve: Callable[..., Tensor]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution, shape ``(batch, out_channels, ...)``.

        Args:
            input: Shape ``(batch, in_channels, ...)``, or without the batch.
            output_size: The wanted size, which ``stride`` leaves open.
        """
        padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        found = self._convolve(
            self.quantize("input", input),
            self.quantize("weight", self.weight),
            self.bias,
            self.stride,
            self.padding,
            padding,
            self.groups,
            self.dilation,
        )
        return self.quantize("output", found)


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """Quantized nn.ConvTranspose1d."""

    _convolve = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """Quantized nn.ConvTranspose2d."""

    _convolve = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """Quantized nn.ConvTranspose3d."""

    _convolve = staticmethod(F.conv_transpose3d)


def transposed_slots(module: nn.Module) -> tuple[Slot, ...]:
    """Return the slots of a transposed convolution.

    Its weight has the shape ``(in_channels, out_channels / groups, ...)``. One scale per output
    channel is one per index of axis 1. With groups, index ``j`` is the ``j``-th channel of every
    group, and these share a scale; a kernel can still apply it after the sum, which runs over one
    group only. A depthwise convolution has nothing on axis 1 to tell apart: there every input
    channel is a group of its own, and axis 0 gives one scale per group.

    Args:
        module: A live nn.ConvTranspose1d, 2d or 3d.
    """
    groups: int = module.groups  # type: ignore[assignment]
    depthwise = groups > 1 and groups == module.in_channels
    channel = -1 - len(module.kernel_size)  # type: ignore[arg-type]
    return (
        Slot("weight", kind="weight", tensor="weight", channel_axis=0 if depthwise else 1),
        Slot("input", channel_axis=channel),
        Slot("output", channel_axis=channel),
    )
