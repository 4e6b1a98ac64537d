"""Rounding by the fastest implementation there is."""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.numerics import Scales, fake_quantize
from bittern.records import QuantizerSpec
from bittern.registry import KernelTable

__all__ = ["round_to_format"]


def round_to_format(
    x: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None,
    whole: Tensor | None,
    *,
    kernels: KernelTable | None,
) -> Tensor:
    """Return `fake_quantize` of ``x``, by a kernel where one takes it.

    Args:
        x: The tensor.
        spec: Format and granularity; a named ``backend`` must have a kernel.
        scales: Static scales; ``None`` computes them from ``x``.
        whole: The static upper level of a format of two levels.
        kernels: Fast implementations; ``None`` uses the reference.
    """
    # torch.compile gets the reference: it fuses that itself, and looks into no kernel
    if spec.backend is not None or (kernels is not None and not torch.compiler.is_compiling()):
        kernel = (kernels or KernelTable()).find(
            "fake_quantize", spec.format.name, x.device, x.dtype, backend=spec.backend
        )
        if kernel is not None:
            more = {} if whole is None else {"global_scale": whole}
            result: Tensor | None = kernel(x, spec, scales, **more)
            if result is not None:  # None: not for this shape
                return result
    return fake_quantize(x, spec, scales, global_scale=whole)
