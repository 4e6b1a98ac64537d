"""Fake quantization through torch.compile: core's reference, fused into one loop.

There is no arithmetic here. A tensor is brought into rows that have one scale each, and core's
`fake_quantize` is compiled for rows of that length: once per format, row length and dtype, for any
number of rows. (With a symbolic extent inside the rows, the compiler makes scalar code.)

The first call of a kind compiles, for seconds and up to minutes. That is why a quantizer has to ask
for this backend by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from bittern.errors import NumericsError
from bittern.numerics import Scales, codec_of, measure, scale_shape, scales_for
from bittern.numerics import fake_quantize as reference
from bittern.records import (
    Granularity,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

__all__ = ["fake_quantize"]

# Below this many elements core is faster than the guards of a compiled function.
SMALLEST = 2**15

BACKEND = "inductor"

# (rows in one dimension, scale, zero point) -> result
Function = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
_FUNCTIONS: dict[tuple[int, int, torch.dtype], Function] = {}


def fake_quantize(x: Tensor, spec: QuantizerSpec, scales: Scales | None) -> Tensor | None:
    """Round ``x`` to what its quantized form decodes to.

    Args:
        x: Tensor on the CPU.
        spec: Format, of one level, and granularity.
        scales: Static scales; ``None`` computes them from ``x``.

    Returns:
        A tensor like ``x``; ``None`` where core takes over: small tensors, those that are not
        contiguous, unsigned formats, granularities that do not follow rows, tensor subclasses,
        gradients, and models that are being compiled anyway.

    Raises:
        NumericsError: There is no working C++ compiler.
    """
    if x.numel() < SMALLEST or not _plain(x, scales) or not codec_of(spec.format).signed:
        return None
    columns = _columns(x, spec.granularity)
    if columns is None:
        return None
    if scales is None and isinstance(spec.granularity, PerTensor):
        scales = scales_for(measure(x, spec), spec)
    if scales is not None and scales.scale.shape != scale_shape(x.shape, spec.granularity):
        return None
    shape = () if isinstance(spec.granularity, PerTensor) else (-1, 1)
    given = (None, None) if scales is None else (scales.scale, scales.zero_point)
    scale, zero_point = (None if part is None else part.detach().reshape(shape) for part in given)
    rows = x.detach().view(-1)
    for part in (rows, *(() if shape == () else (scale, zero_point))):
        if part is not None:  # one version for any number of rows; all else is constant
            torch._dynamo.maybe_mark_dynamic(part, 0)
    function = _function(spec.format, columns, x.dtype)
    try:
        with torch.no_grad():  # one mode, so that the function is compiled once
            return function(rows, scale, zero_point).view(x.shape)
    except BackendCompilerFailed as error:
        raise NumericsError(
            f"the backend 'compile' cannot compile {spec.format.name} for {x.dtype}: {error}",
            hint="torch.compile needs a C++ compiler; without one leave the backend out",
        ) from error


def _plain(x: Tensor, scales: Scales | None) -> bool:
    """Whether a flat view of ``x`` can go into a compiled function that nobody looks into."""
    if torch.compiler.is_compiling() or not x.is_contiguous():
        return False
    given = (x,) if scales is None else (x, scales.scale, scales.zero_point)
    tensors = [tensor for tensor in given if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
    )


def _columns(x: Tensor, granularity: Granularity) -> int | None:
    """Return the length of rows that have one scale, 0 for a single scale, or ``None``."""
    match granularity:
        case PerTensor():
            return 0
        case PerToken() if x.dim():
            return x.shape[-1]
        case PerChannel(axes=(axis,)) if axis in (0, -x.dim()) and x.dim():
            return math.prod(x.shape[1:])
        case PerGroup(size=size, axis=axis) if axis in (-1, x.dim() - 1) and x.dim():
            return size if x.shape[-1] % size == 0 else None
    return None


def _function(number_format: NumberFormat, columns: int, dtype: torch.dtype) -> Function:
    """Return the compiled function for a format and rows of ``columns`` elements."""
    key = (id(codec_of(number_format)), columns, dtype)  # a codec is made once, and stays
    if key not in _FUNCTIONS:
        spec = QuantizerSpec(number_format, PerGroup(columns) if columns else PerTensor())

        def rows(x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
            scales = None if scale is None else Scales(scale, zero_point)
            return reference(x.view(-1, columns) if columns else x, spec, scales)

        # torch.compile counts versions per code object, and gives up at a few: each gets its own.
        own = FunctionType(rows.__code__.replace(), rows.__globals__, closure=rows.__closure__)
        _FUNCTIONS[key] = torch.compile(own, fullgraph=True, backend=BACKEND)
    return _FUNCTIONS[key]
