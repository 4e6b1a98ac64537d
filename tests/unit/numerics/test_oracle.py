"""The rule against oracles that share no code with core: numpy loops and exhaustive grids."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.numerics import FloatCodec, IntCodec, amax, fake_quantize, quantize
from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

EXAMPLES = settings.default.max_examples // 2

SameBits = Callable[[Tensor, Tensor], bool]
MakeSpec = Callable[..., QuantizerSpec]

GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerToken(),
    PerGroup(1),
    PerGroup(4),
    PerGroup(5),
    PerGroup(100),
    PerBlock(2, 3),
    PerBlock(1, 1),
    PerBlock(50, 4),
]
FINEST = np.float32(2.0**-149)


def scale_index(index: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Return which scale the element at ``index`` has, in the words of the documentation."""
    match granularity:
        case PerChannel(axis=axis):
            keep = axis % len(index)
            return tuple(i if d == keep else 0 for d, i in enumerate(index))
        case PerToken():
            return (*index[:-1], 0)
        case PerGroup(size=size):
            return (*index[:-1], index[-1] // size)
        case PerBlock(rows=rows, cols=cols):
            return (*index[:-2], index[-2] // rows, index[-1] // cols)
    return ()


def oracle_amax(x: np.ndarray, granularity: Granularity) -> dict[tuple[int, ...], np.float32]:
    found: dict[tuple[int, ...], np.float32] = {}
    for index in np.ndindex(x.shape):
        key = scale_index(index, granularity)
        found[key] = np.maximum(found.get(key, np.float32(0)), np.abs(x[index]))
    return found


def oracle(
    x: np.ndarray,
    granularity: Granularity,
    largest: float,
    element: Callable[[np.float32], np.float32],
) -> tuple[np.ndarray, np.ndarray]:
    """Return grid values and decoded values, one element at a time, in float32."""
    codes, decoded = np.zeros_like(x), np.zeros_like(x)
    ranges = oracle_amax(x, granularity)
    with np.errstate(under="ignore"):
        for index in np.ndindex(x.shape):
            highest = ranges[scale_index(index, granularity)]
            scale = np.float32(1)
            if highest != 0:
                scale = np.maximum(highest / np.float32(largest), FINEST)
            codes[index] = element(x[index] / scale) + np.float32(0)
            decoded[index] = codes[index] * scale
    return codes, decoded


def sample(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 5, shape)
    normal = rng.standard_normal(shape).astype(np.float32)
    x = np.choose(
        kinds,
        [
            normal,
            rng.integers(-20, 20, shape).astype(np.float32) / 2,
            np.zeros(shape, np.float32),
            normal * np.float32(1e-30),
            rng.integers(-5, 5, shape).astype(np.float32) * FINEST,
        ],
    ).astype(np.float32)
    if rng.integers(0, 3) == 0:
        x = x * np.float32(1e30)
    limit = torch.finfo(dtype).max
    return torch.from_numpy(x).clamp(-limit, limit).to(dtype)


@settings(max_examples=5 * EXAMPLES)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 11)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    granularity=st.sampled_from(GRANULARITIES),
    bits=st.integers(2, 8),
    narrow=st.booleans(),
)
def test_integers_are_rint_of_x_by_scale_in_float32(
    *,
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    granularity: Granularity,
    bits: int,
    narrow: bool,
    make_spec: MakeSpec,
    same_bits: SameBits,
) -> None:
    x = sample(seed, shape, dtype)
    high = 2 ** (bits - 1) - 1
    low = -high if narrow else -high - 1
    spec = make_spec(f"int{bits}{'n' if narrow else ''}", granularity)

    codes, decoded = oracle(
        x.float().numpy(), granularity, high, lambda v: np.clip(np.rint(v), low, high)
    )

    assert torch.equal(quantize(x, spec).codes, torch.from_numpy(codes).to(torch.int8))
    assert same_bits(fake_quantize(x, spec), torch.from_numpy(decoded).to(dtype))


@settings(max_examples=3 * EXAMPLES)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 11)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    granularity=st.sampled_from(GRANULARITIES),
    name=st.sampled_from(["fp8", "fp8_e5m2"]),
)
def test_fp8_is_the_saturated_cast_of_x_by_scale(
    *,
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    granularity: Granularity,
    name: str,
    make_spec: MakeSpec,
    same_bits: SameBits,
) -> None:
    x = sample(seed, shape, dtype)
    storage = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    largest = {"fp8": 448.0, "fp8_e5m2": 57344.0}[name]

    def element(v: np.float32) -> np.float32:
        clipped = np.clip(v, np.float32(-largest), np.float32(largest))
        return np.float32(torch.tensor(float(clipped)).to(storage).float().item())

    _, decoded = oracle(x.float().numpy(), granularity, largest, element)

    spec = make_spec(name, granularity)
    assert same_bits(fake_quantize(x, spec), torch.from_numpy(decoded).to(dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_amax_is_the_largest_magnitude_of_each_part(granularity: Granularity) -> None:
    x = sample(3, (2, 5, 11), torch.float32)
    found = amax(x, granularity)

    for index, value in oracle_amax(x.numpy(), granularity).items():
        assert found[index].item() == value


@pytest.mark.parametrize("mantissa", [(3, -6, 448.0), (2, -14, 57344.0)], ids=["e4m3", "e5m2"])
def test_fp8_rounds_to_the_nearest_grid_value_and_ties_to_even(
    mantissa: tuple[int, int, float],
) -> None:
    """The grid is built from its definition, so torch's cast is on trial here too."""
    bits, smallest_exponent, largest = mantissa
    codec = FloatCodec("float8_e4m3fn" if bits == 3 else "float8_e5m2")
    grid = {m * 2.0 ** (smallest_exponent - bits) for m in range(2**bits)}  # subnormals
    exponent = smallest_exponent
    while 2.0**exponent <= largest:
        grid |= {(1 + m / 2**bits) * 2.0**exponent for m in range(2**bits)}
        exponent += 1
    points = sorted(v for v in grid if v <= largest)
    assert codec.max_value == largest
    assert len(points) == {3: 127, 2: 124}[bits]

    for place, (below, above) in enumerate(pairwise(points)):
        middle = (below + above) / 2
        even = below if place % 2 == 0 else above  # the last bit of the code is its parity
        nearer = np.nextafter(np.float32(middle), np.float32(0))
        farther = np.nextafter(np.float32(middle), np.float32(1e9))
        values = torch.tensor([below, middle, float(nearer), float(farther), -middle])
        expected = torch.tensor([below, even, below, above, -even])
        assert torch.equal(codec.round_(values), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("narrow", [False, True])
def test_integers_round_ties_to_even_and_saturate(bits: int, *, narrow: bool) -> None:
    codec = IntCodec(bits, narrow)
    high = 2 ** (bits - 1) - 1
    low = -high if narrow else -high - 1
    values = torch.arange(-2 * high - 4, 2 * high + 5, dtype=torch.float32) / 2

    expected = [float(min(max(round(v), low), high)) for v in values.tolist()]  # Python: to even

    assert codec.round_(values.clone()).tolist() == expected
    assert codec.load(codec.store(codec.round_(values.clone()))).tolist() == expected
