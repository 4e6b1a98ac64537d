"""Comparing tensors and nested structures: bit for bit, or by signal to noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["assert_bit_identical", "assert_sqnr", "sqnr", "tensors_of"]


def tensors_of(value: object) -> list[Tensor]:
    """Return the tensors of a nested structure, in order.

    Args:
        value: A tensor, or mappings, sequences and objects with attributes that hold tensors.
    """
    return list(_tensors(value))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))


def assert_bit_identical(
    a: object, b: object, *, what: str = "value", any_nan: bool = False
) -> None:
    """Assert that two values are the same down to the last bit: -0 is not +0.

    Args:
        a: The expected value: a tensor, a nested structure, or plain data.
        b: The value found.
        what: What it is, for the message.
        any_nan: Whether two NaN are equal whatever their payload.

    Raises:
        AssertionError: Names the place in the structure and the first element that differs.
    """
    __tracebackhide__ = True
    difference = _difference(a, b, what, any_nan=any_nan)
    if difference is not None:
        raise AssertionError(difference)


def _difference(a: object, b: object, at: str, *, any_nan: bool) -> str | None:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensor_difference(a, b, at, any_nan=any_nan)
    if type(a) is not type(b):
        return f"{at}: a {type(a).__name__} against a {type(b).__name__}"
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if list(a) != list(b):
            return f"{at}: the keys {list(a)} against {list(b)}"
        pairs = [(a[key], b[key], f"{at}[{key!r}]") for key in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{at}: {len(a)} items against {len(b)}"
        pairs = [(x, y, f"{at}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif hasattr(a, "__dataclass_fields__"):
        names = list(a.__dataclass_fields__)
        pairs = [(getattr(a, name), getattr(b, name), f"{at}.{name}") for name in names]
    elif isinstance(a, float) and isinstance(b, float):
        same = a.hex() == b.hex()  # -0 and NaN included
        return None if same else f"{at}: {a!r} against {b!r}"
    else:
        return None if a == b else f"{at}: {a!r} against {b!r}"
    found = (_difference(x, y, place, any_nan=any_nan) for x, y, place in pairs)
    return next((text for text in found if text is not None), None)


def _tensor_difference(a: Tensor, b: Tensor, at: str, *, any_nan: bool) -> str | None:
    if a.dtype != b.dtype:
        return f"{at}: dtype {a.dtype} against {b.dtype}"
    if a.shape != b.shape:
        return f"{at}: shape {tuple(a.shape)} against {tuple(b.shape)}"
    mine, theirs = _bytes(a), _bytes(b)
    differs = (mine != theirs).any(dim=1)
    if any_nan and a.is_floating_point():
        both = _flat(a).float().isnan() & _flat(b).float().isnan()
        differs &= ~both
    count = int(differs.sum())
    if count == 0:
        return None
    first = int(differs.nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), a.shape))
    hexes = ["0x" + bytes(row[first].tolist()[::-1]).hex() for row in (mine, theirs)]
    values = [_flat(t)[first].item() for t in (a, b)]
    return (
        f"{at}: {count} of {a.numel()} elements differ, first at {index}: "
        f"{values[0]!r} ({hexes[0]}) against {values[1]!r} ({hexes[1]})"
    )


def _flat(x: Tensor) -> Tensor:
    whole = x.detach().to("cpu").contiguous()
    return whole.as_strided((whole.numel(),), (1,))  # a stride of 0 is contiguous too


def _bytes(x: Tensor) -> Tensor:
    return _flat(x).view(torch.uint8).reshape(x.numel(), x.element_size())


def sqnr(reference: object, value: object) -> float:
    """Return the signal to quantization noise ratio over all tensors, in dB.

    ``10 log10(sum(y^2) / sum((y_q - y)^2))``; ``inf`` where nothing differs.

    Args:
        reference: A tensor or a nested structure of tensors.
        value: The same with noise.

    Raises:
        AssertionError: They hold tensors of other numbers or shapes.
    """
    ours, theirs = tensors_of(reference), tensors_of(value)
    shapes = [[tuple(t.shape) for t in side] for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise AssertionError(f"tensors of shapes {shapes[0]} against {shapes[1]}")
    signal = noise = 0.0
    for y, z in zip(ours, theirs, strict=True):
        exact, found = y.detach().double().cpu(), z.detach().double().cpu()
        signal += float(exact.square().sum())
        noise += float((found - exact).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def assert_sqnr(reference: object, value: object, min_db: float) -> float:
    """Assert that ``value`` is ``reference`` with little noise.

    Args:
        reference: A tensor or a nested structure of tensors.
        value: The same with noise.
        min_db: The least signal to noise ratio, in dB.

    Returns:
        The ratio in dB.

    Raises:
        AssertionError: There is more noise, or NaN.
    """
    __tracebackhide__ = True
    found = sqnr(reference, value)
    if not found >= min_db:  # NaN compares false
        raise AssertionError(f"the SQNR is {found:.1f} dB, at least {min_db:g} dB are wanted")
    return found
