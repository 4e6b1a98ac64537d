"""Quantizes weights once for the duration of a block, instead of on every forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from bittern.nn import TensorQuantizer, named_quant_modules

__all__ = ["folded_weights"]


@contextmanager
def folded_weights(
    model: nn.Module, access: Callable[..., AbstractContextManager[None]] | None = None
) -> Iterator[Callable[[bool], None]]:
    """Hold quantized copies of all weights while the block runs.

    Yields:
        A switch: ``switch(True)`` runs the model with quantized weights (the start),
        ``switch(False)`` with the original ones. Weights that are not resident, and tied ones,
        which another module may read differently, are left alone and quantized on every pass.
    """
    readers = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    folds: list[tuple[TensorQuantizer, Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for _, module in named_quant_modules(model):
            for quantizer in module.slots().values():
                tensor = getattr(module, quantizer.tensor or "", None)
                if not isinstance(tensor, nn.Parameter) or tensor.device.type == "meta":
                    continue
                if readers[id(tensor)] > 1:
                    continue
                if not quantizer.enabled or not quantizer.calibrated:
                    continue
                with access(module, write=False) if access is not None else nullcontext():
                    folds.append((quantizer, tensor, tensor.data, quantizer(tensor.data)))

    def switch(on: bool) -> None:
        for quantizer, parameter, original, quantized in folds:
            for link in quantizer.chain():
                link.enabled = False
            quantizer.folded = on  # a rotation or pre-scale is in the copy already
            parameter.data = quantized if on else original

    try:
        switch(True)
        yield switch
    finally:
        for quantizer, parameter, original, _ in folds:
            parameter.data = original
            quantizer.folded = False
            for link in quantizer.chain():
                link.enabled = True
