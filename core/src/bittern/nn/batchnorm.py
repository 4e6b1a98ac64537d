"""A BatchNorm whose scale was folded into the layer before it: it only adds a constant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.nn.in_out import QuantInOut
from bittern.nn.module import QuantModule, original_class, restore_class, swap_class

__all__ = ["FoldedBatchNorm", "freeze", "is_folded", "is_plain", "keep_shift"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FoldedBatchNorm(QuantInOut):
    """A BatchNorm that computes in training what it computes in evaluation; slots ``input output``.

    Its statistics are those of a scale of one (`keep_shift`). Statistics of a batch would normalize
    once more what the layer before it does already, so they are never taken, nor kept.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    _check_input_dim: Any

    def forward(self, input: Tensor) -> Tensor:
        """Return the input plus the constant of each channel, in the shape of the input."""
        self._check_input_dim(input)
        found = F.batch_norm(
            self.quantize("input", input),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
        )
        return self.quantize("output", found)


def is_plain(module: nn.Module) -> bool:
    """Whether a module, converted or not, is a BatchNorm that runs torch's own forward."""
    own = original_class(module)
    return any(issubclass(own, cls) and own.forward is cls.forward for cls in _PLAIN)


@torch.no_grad()
def keep_shift(module: Any, shift: Tensor) -> None:
    """Give a BatchNorm the state in which it multiplies by one and adds ``shift``.

    The variance becomes ``1 - eps``, which ``eps`` makes one again. The constant is the bias, which
    training can go on with; where there is none, it is minus the mean.

    Args:
        module: A BatchNorm with running statistics.
        shift: One number per channel.
    """
    module.running_var.fill_(1 - module.eps)
    module.running_mean.zero_()
    if module.weight is not None:
        module.weight.fill_(1)
    if module.bias is not None:
        module.bias.copy_(shift)
    else:
        module.running_mean.copy_(-shift)


def is_folded(module: Any) -> bool:
    """Whether a BatchNorm is in the state that `keep_shift` gives.

    No training leads there: the variance of every channel is exactly ``1 - eps``. (The gain says
    nothing: smoothing may have scaled it since.)
    """
    variance = module.running_var
    return variance is not None and torch.equal(variance, torch.full_like(variance, 1 - module.eps))


def freeze(module: nn.Module) -> None:
    """Give a folded BatchNorm the class `FoldedBatchNorm`; the gain of one is not trained.

    Args:
        module: A BatchNorm in the state that `keep_shift` gives; its quantizers stay.
    """
    quantizers = module.slots() if isinstance(module, QuantModule) else {}
    restore_class(module)
    swap_class(module, FoldedBatchNorm, quantizers)
    if isinstance(module.weight, nn.Parameter):
        module.weight.requires_grad_(False)  # the scale of the layer before it is trained
