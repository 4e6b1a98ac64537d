"""Fake quantization on the CPU, bit for bit what core's reference computes, several times faster.

The reference makes one pass over main memory per operation. Here a tensor is worked through in
chunks: all operations on a chunk run while it lies in the cache, in place on one scratch buffer,
and each element crosses the memory bus twice. Only torch operations, so nothing is compiled.

Rounding to a float8 grid is arithmetic, because torch's own cast is scalar code on CPUs. For ``v``
with ``2^e <= |v| < 2^(e+1)`` the grid with ``m`` mantissa bits has the step
``q = 2^(max(e, emin) - m)``. Adding ``c = 1.5 * 2^23 * q`` to ``v`` rounds it to a multiple of
``q``, ties to even: floats near ``c`` are ``q`` apart, and ``c`` is an even multiple of ``q``.
Subtracting ``c`` is exact and turns -0 into +0, as the rule wants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bittern.numerics import Codec, FloatCodec, IntCodec, Scales, amax, codec_of, scale_shape
from bittern.records import Granularity, PerChannel, PerGroup, PerTensor, PerToken, QuantizerSpec

__all__ = ["fake_quantize"]

# Elements per chunk and thread: 1 MiB of float32. Larger chunks leave the cache; smaller ones pay
# for calling torch, and for one thread barrier per call.
CHUNK = 2**18

# Below this many elements the reference, which makes fewer calls, is as fast or faster. For
# integers from float32 it makes no temporary and only loses when the result leaves the cache.
SMALLEST = {IntCodec: 2**20, FloatCodec: 2**14}
SMALLEST_FLOAT32 = {IntCodec: 2**23, FloatCodec: 2**14}
SMALLEST_OF_ALL = 2**14

EXPONENT = 0x7F800000  # the exponent bits of a float32


def fake_quantize(x: Tensor, spec: QuantizerSpec, scales: Scales | None) -> Tensor | None:
    """Round ``x`` to what its quantized form decodes to.

    Args:
        x: Tensor on the CPU.
        spec: Format and granularity.
        scales: Static scales; ``None`` computes them from ``x``.

    Returns:
        A tensor like ``x``; ``None`` where the reference takes over: small tensors, formats and
        granularities not implemented here, scales of a wrong shape, tensor subclasses, gradients.
    """
    if x.numel() < SMALLEST_OF_ALL:  # most activations of a short forward pass: say so at once
        return None
    codec = codec_of(spec.format)
    smallest = (SMALLEST_FLOAT32 if x.dtype == torch.float32 else SMALLEST).get(type(codec))
    if smallest is None or x.numel() < smallest or not _plain(x, scales):
        return None
    columns = _columns(x, spec.granularity)
    if columns is None:
        return None
    if scales is not None and scales.scale.shape != scale_shape(x.shape, spec.granularity):
        return None
    if not isinstance(spec.granularity, PerTensor):
        rows = scales.scale.reshape(-1, 1) if scales is not None else None
        return _run(x.reshape(-1, columns), codec, rows).view(x.shape)
    scale = scales.scale if scales is not None else codec.scales(amax(x, PerTensor())).scale
    if x.is_contiguous():
        return _run(x.view(-1, 1), codec, scale).view(x.shape)
    order = x.dim_order()  # of memory: a channels-last tensor stays one
    stored = x.permute(order)
    out = _run(stored.reshape(-1, 1), codec, scale).view(stored.shape)
    return out.permute([order.index(dim) for dim in range(x.dim())])


def _plain(x: Tensor, scales: Scales | None) -> bool:
    """Whether writing into buffers is allowed: no autograd, no functorch, no tensor subclass."""
    tensors = [x] if scales is None else [x, scales.scale]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(
        type(t) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in tensors
    )


def _columns(x: Tensor, granularity: Granularity) -> int | None:
    """Return the row length at which scales may change; ``None`` if they do not follow rows."""
    match granularity:
        case PerTensor():
            return 1
        case PerToken():
            return x.shape[-1]
        case PerChannel(axis=axis) if axis in (0, -x.dim()):
            return x.numel() // x.shape[0]
        case PerGroup(size=size) if x.shape[-1] % size == 0:
            return size
    return None


def _run(x: Tensor, codec: Codec, scale: Tensor | None) -> Tensor:
    """Return ``x``, ``(rows, columns)``, fake-quantized chunk by chunk.

    Args:
        x: The input.
        codec: The format.
        scale: ``()``, ``(rows, 1)``, or ``None`` to compute one per row.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = x.shape
    step = min(rows, max(1, CHUNK * torch.get_num_threads() // columns))
    round_ = _rounding(codec, step * columns, x.device)
    exact = x.dtype == torch.float32  # then the output is its own scratch buffer
    buffer = out if exact else torch.empty(step, columns, dtype=torch.float32, device=x.device)
    for start in range(0, rows, step):
        part, target = x[start : start + step], out[start : start + step]
        work = target if exact else buffer[: len(part)]
        values = part if exact else work.copy_(part)
        if scale is None:
            own = codec.scales(amax(values, PerToken())).scale
        else:
            own = scale if scale.dim() == 0 else scale[start : start + step]
        round_(torch.div(values, own, out=work), own)
        if not exact:
            target.copy_(work)
    return out


def _rounding(
    codec: Codec, elements: int, device: torch.device
) -> Callable[[Tensor, Tensor], object]:
    """Return a function ``(values, scale)`` that rounds to the grid and rescales, in place."""
    if isinstance(codec, FloatCodec):
        grid = torch.finfo(codec.storage)
        carry = 1.5 * 2.0**23 * grid.eps
        exponent = torch.tensor(EXPONENT, dtype=torch.int32, device=device)
        powers = torch.empty(elements, dtype=torch.float32, device=device)

        def to_float(values: Tensor, scale: Tensor) -> object:
            power = powers[: values.numel()].view(values.shape)
            values.clamp_(-grid.max, grid.max)
            bits = values.view(torch.int32)
            torch.bitwise_and(bits, exponent, out=power.view(torch.int32))
            power.clamp_min_(grid.smallest_normal)
            return values.add_(power, alpha=carry).sub_(power, alpha=carry).mul_(scale)

        return to_float

    assert isinstance(codec, IntCodec)
    low, high = codec.min_value, codec.max_value
    zero = torch.zeros((), device=device)

    def to_int(values: Tensor, scale: Tensor) -> object:
        values.clamp_(low, high).round_()
        if scale.dim():
            return values.add_(zero).mul_(scale)  # adding 0 turns -0 into +0
        return torch.add(zero, values, alpha=float(scale), out=values)  # the same in one pass

    return to_int
