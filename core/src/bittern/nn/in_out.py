"""What layers without a weight matrix have quantized: what goes in, and what comes out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bittern.nn.module import QuantModule

__all__ = ["QuantInOut"]


class QuantInOut(QuantModule):
    """A norm, pool or activation between two quantizers; slots ``input``, ``output``.

    The layer itself runs the original's ``forward``, so it keeps its running statistics, its
    parameters (vectors of gains, which are not worth quantizing) and its further arguments. Of a
    layer that returns several tensors, as max pools with ``return_indices``, the first is
    quantized. What a layer with ``inplace`` computes is written into its input, as before.
    """

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the original makes of the quantized input, quantized."""
        inplace = getattr(self, "inplace", False)
        given = self.quantize("input", input)
        if inplace and given is input and self.quantizer("output") is not None:
            given = input.clone()  # autograd keeps what the layer writes: nobody may round it
        found = super().forward(given, *args, **kwargs)
        if isinstance(found, tuple):
            return (self.quantize("output", found[0]), *found[1:])
        result = self.quantize("output", found)
        if inplace and result is not input:
            return input.copy_(result)  # the caller may go on with its own tensor
        return result
