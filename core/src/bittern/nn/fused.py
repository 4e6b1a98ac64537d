"""Layers of torch.nn that read the weights of their children and never call them.

In evaluation, `nn.TransformerEncoderLayer` hands all its weights to one fused kernel,
`nn.TransformerEncoder` packs padded batches into nested tensors for it, and `nn.MultiheadAttention`
always reads the weight of ``out_proj``. A converted child would be quantized in name only. Once a
child is converted, such a layer gets a class that calls it, without any quantizer of its own.
"""

from __future__ import annotations

import torch
from torch import nn

from bittern.nn.intercept import is_active
from bittern.nn.module import QuantModule, named_quantizers, swap_class
from bittern.nn.multihead import QuantMultiheadAttention

__all__ = ["call_children"]


def call_children(model: nn.Module) -> None:
    """Make the fused layers of a converted model call their children; reverting undoes it."""
    for module in list(model.modules()):
        if isinstance(module, QuantModule) or not _converted_inside(module):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            swap_class(module, _CallingEncoderLayer, {})
        elif isinstance(module, nn.TransformerEncoder):
            swap_class(module, _CallingEncoder, {})
        elif calls_out_proj(module):
            swap_class(module, QuantMultiheadAttention, {})


def calls_out_proj(module: nn.Module) -> bool:
    """Whether a module is an attention that `QuantMultiheadAttention` can stand in for."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
    )


def _converted_inside(module: nn.Module) -> bool:
    return any(isinstance(child, QuantModule) for child in module.modules())


def _unfused(module: nn.Module) -> bool:
    # a compiler fuses by itself, and does not look into vars of a module
    if torch.compiler.is_compiling():
        return True
    return any(is_active(quantizer) for _, quantizer in named_quantizers(module))


class _CallingEncoderLayer(QuantModule):
    """An encoder layer that does not take its fused kernel while a quantizer is active.

    The original asks this attribute whether its activation is one that the kernel knows; the two
    are the documented conditions for it. With all quantizers off it computes what it always did.
    """

    @property
    def activation_relu_or_gelu(self) -> int:
        """0: an activation that the fused kernel does not know."""
        return 0 if _unfused(self) else int(vars(self)["activation_relu_or_gelu"])


class _CallingEncoder(QuantModule):
    """An encoder that packs no nested tensors while a quantizer is active.

    What it returns for padding is then what its layers compute there, as in training; the fused
    kernel of the original gives zeros.
    """

    @property
    def use_nested_tensor(self) -> bool:
        """What ``enable_nested_tensor=False`` would have set."""
        return not _unfused(self) and bool(vars(self)["use_nested_tensor"])
