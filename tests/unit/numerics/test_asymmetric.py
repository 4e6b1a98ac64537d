"""Integers with a zero point, and unsigned ones: the rule, 0 exactly on the grid, their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bittern.builtin.formats import FORMATS
from bittern.errors import NumericsError
from bittern.numerics import (
    IntCodec,
    Range,
    Scales,
    dequantize,
    fake_quantize,
    quantize,
    scales_for,
    scales_from_amax,
)
from bittern.records import PerChannel, PerGroup, PerTensor, QuantizerSpec

BY_NAME = {item.name: item for item in FORMATS}
by_bits = pytest.mark.parametrize("bits", [4, 8])


def spec(bits: int, granularity: PerTensor | PerChannel | PerGroup | None = None) -> QuantizerSpec:
    return QuantizerSpec(BY_NAME[f"int{bits}-asym"], granularity or PerTensor())


@by_bits
@given(
    values=st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: 0.0 if abs(v) < 1e-30 else v),
        min_size=1,
        max_size=20,
    )
)
def test_scale_zero_point_and_codes_are_those_of_a_loop(bits: int, values: list[float]) -> None:
    f32 = np.float32
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (f32(high) - f32(low)) / f32(highest - lowest) if low != high else f32(1)
    zero = int(np.clip(np.rint(f32(lowest) - f32(low) / scale), lowest, highest))
    expected = [int(np.clip(np.rint(f32(v) / scale) + zero, lowest, highest)) for v in values]

    packed = quantize(torch.tensor(values), spec(bits))
    assert packed.scales.zero_point is not None
    assert packed.scales.scale.item() == scale
    assert packed.scales.zero_point.item() == zero
    assert packed.codes.tolist() == expected
    decoded = [f32(code - zero) * scale for code in expected]
    assert dequantize(packed).tolist() == [float(v) for v in decoded]


@by_bits
def test_zero_stays_exactly_zero_wherever_the_range_lies(bits: int) -> None:
    for ends in ([1.0, 3.0], [-3.0, -1.0], [-1.0, 5.0], [-1e-3, 1e3]):
        x = torch.tensor([0.0, -0.0, *ends])
        found = fake_quantize(x, spec(bits))
        assert found[:2].tolist() == [0, 0]
        assert not bool(torch.signbit(found[:2]).any())


@by_bits
def test_a_one_sided_range_gets_all_codes(bits: int) -> None:
    x = torch.linspace(0, 3, 1000)
    codes = quantize(x, spec(bits)).codes

    assert len(codes.unique()) == 2**bits
    symmetric = QuantizerSpec(BY_NAME[f"int{bits}"], PerTensor())
    errors = [(fake_quantize(x, s) - x).abs().max().item() for s in (spec(bits), symmetric)]
    assert errors[0] < 0.55 * errors[1]


@by_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_largest_numbers_stay_finite(bits: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for ends in ([largest, -largest], [largest, 0], [-largest, 0], [largest, -largest / 3]):
        x = torch.tensor(ends, dtype=dtype)
        found = fake_quantize(x, spec(bits))
        assert bool(found.isfinite().all())
        assert torch.equal(found, dequantize(quantize(x, spec(bits))))
        assert bool(((found.double() - x.double()).abs() <= largest / 2 ** (bits - 1)).all())


@by_bits
def test_every_group_has_its_own_zero_point(bits: int) -> None:
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) + torch.arange(4)[:, None]
    packed = quantize(x, spec(bits, PerGroup(8)))

    assert packed.scales.zero_point is not None
    assert packed.scales.zero_point.shape == (4, 3)
    for row in range(4):
        for group in range(3):
            part = x[row, 8 * group : 8 * group + 8]
            alone = quantize(part, spec(bits))
            assert torch.equal(packed.codes[row, 8 * group : 8 * group + 8], alone.codes)


def test_what_lies_beyond_a_static_range_saturates_at_its_ends() -> None:
    scales = scales_for(Range(torch.tensor(2.0), amin=torch.tensor(-1.0)), spec(8))
    found = fake_quantize(torch.tensor([1e30, -1e30]), spec(8), scales)

    assert found.tolist() == pytest.approx([2.0, -1.0], abs=3 / 255)


def test_one_end_of_a_range_or_scales_without_zero_points_are_refused() -> None:
    with pytest.raises(NumericsError, match="needs both ends of a range"):
        scales_from_amax(torch.tensor(1.0), spec(8))
    with pytest.raises(NumericsError, match="needs zero points beside its scales"):
        fake_quantize(torch.ones(2), spec(8), Scales(torch.tensor(1.0)))


# --- unsigned -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "largest"), [("uint4", 15), ("uint8", 255)])
def test_unsigned_integers_use_every_code_for_what_is_not_negative(name: str, largest: int) -> None:
    x = torch.linspace(0, 7, 2000)
    packed = quantize(x, QuantizerSpec(BY_NAME[name], PerTensor()))

    assert packed.codes.dtype == torch.uint8
    assert packed.codes.unique().tolist() == list(range(largest + 1))
    assert packed.scales.scale.item() == (torch.tensor(7.0) / largest).item()


@pytest.mark.parametrize("name", ["uint4", "uint8"])
def test_unsigned_integers_refuse_negative_numbers_and_take_negative_zero(name: str) -> None:
    found = QuantizerSpec(BY_NAME[name], PerTensor())
    for call in (fake_quantize, quantize):
        with pytest.raises(NumericsError, match=f"{name} holds no negative numbers"):
            call(torch.tensor([1.0, -1e-30]), found)
    assert fake_quantize(torch.tensor([1.0, -0.0]), found)[1].item() == 0


def test_combinations_that_mean_nothing_are_refused() -> None:
    for options in ({"narrow": True}, {"asymmetric": True}):
        with pytest.raises(NumericsError, match="neither narrow nor asymmetric"):
            IntCodec(8, unsigned=True, **options)


def test_nan_shows_in_its_own_group() -> None:
    x: Tensor = torch.ones(2, 16)
    x[0, 3], x[1, 9] = math.nan, math.inf
    bad = fake_quantize(x, spec(8, PerGroup(8))).isnan().unflatten(1, (2, 8)).all(-1)

    assert bad.tolist() == [[True, False], [False, True]]
