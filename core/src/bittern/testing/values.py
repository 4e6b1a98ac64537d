"""Tensors that break quantization code: Hypothesis strategies and hand-picked values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.records import Granularity, PerBlock, PerChannel, PerGroup

__all__ = ["adversarial", "explore", "layouts", "shapes", "tensors"]

T = TypeVar("T")


def explore(strategy: st.SearchStrategy[T], judge: Callable[[T], object], *, examples: int) -> None:
    """Let ``judge`` raise for one of ``examples`` values; the same ones every time.

    Args:
        strategy: Makes the values.
        judge: Raises where something is wrong; Hypothesis shrinks the value.
        examples: How many.
    """

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: T) -> None:
        judge(value)

    run()


def shapes(granularity: Granularity) -> st.SearchStrategy[tuple[int, ...]]:
    """Return shapes of small tensors that have ``granularity``, partial groups included."""
    side = st.integers(1, 40)
    least = 1
    match granularity:
        case PerChannel(axes=axes):
            least = max(axis + 1 if axis >= 0 else -axis for axis in axes)
        case PerBlock():
            least = 2
        case PerGroup(size=size):
            last = st.integers(1, 3).map(lambda n: n * size) | st.integers(1, 2 * size)
            return st.tuples(st.integers(1, 9), last)
    return st.lists(side, min_size=least, max_size=max(3, least)).map(tuple)


@st.composite
def tensors(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype],
    shape: st.SearchStrategy[tuple[int, ...]],
    finite: bool = False,
) -> Tensor:
    """Make tensors of numbers of many magnitudes, with a few special ones among them.

    Args:
        draw: Given by Hypothesis.
        dtypes: Floating dtypes.
        shape: Their shapes.
        finite: Whether NaN, Inf and what overflows the dtype are left out.
    """
    dtype = draw(st.sampled_from(list(dtypes)))
    size = draw(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = draw(st.sampled_from([(-3, 3), (-30, 20), (-140, -120), (8, 15)]))
    exponents = torch.randint(low, high, size, generator=generator).double()
    values = torch.randn(size, generator=generator).double() * torch.exp2(exponents)
    width: Any = {torch.float16: 16}.get(dtype, 32)
    floats = st.floats(width=width, allow_nan=not finite, allow_infinity=not finite)
    special = draw(st.lists(floats, max_size=6))
    places = torch.randperm(values.numel(), generator=generator).tolist()
    flat = values.flatten()
    for value, place in zip(special, places, strict=False):
        flat[place] = value
    if finite:
        limit = torch.finfo(dtype).max
        flat = flat.clamp(-limit, limit)
    made = flat.reshape(size).to(dtype)
    return made.nan_to_num(0.0, 1.0, -1.0) if finite else made


def adversarial(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(what, rows)``: tensors of shape ``(4, 16 n)`` with values at which code breaks."""
    grid = torch.finfo(dtype)
    picked = {
        "ties between integers": torch.arange(-160, 160) / 2,
        "ties between small floats": torch.arange(-64, 64) / 2 * 2.0**-4 + 2.0**-5,
        "subnormal numbers": torch.arange(-32, 32) * grid.smallest_normal / 8,
        "signed zeros": torch.tensor([0.0, -0.0] * 32),
        "the largest numbers": torch.tensor([grid.max, -grid.max, grid.max / 2, 1.0] * 16),
        "one outlier": torch.cat([torch.full((63,), grid.tiny), torch.tensor([grid.max])]),
        "all equal": torch.full((64,), 0.1),
        "zeros": torch.zeros(64),
    }
    for what, values in picked.items():
        yield what, values.double().to(dtype).reshape(4, -1)


def layouts(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(what, tensor)``: the same kind of numbers in unusual places of memory."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 8, 6, 32, generator=generator).to(dtype)
    yield "transposed", base.transpose(0, 1)
    yield "every second row", base[:, ::2]
    yield "the first half of every row", base[..., :16]
    yield "channels last", base.to(memory_format=torch.channels_last)
    yield "expanded", base[0, 0, :1].expand(24, 32)
    yield "not at the start of its storage", base.flatten()[3:-13].view(-1, 16)
