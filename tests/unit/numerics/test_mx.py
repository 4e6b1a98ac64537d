"""MX formats: the exponents against exact arithmetic, their bytes, their edges."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bittern.builtin.formats import FORMATS
from bittern.errors import NumericsError
from bittern.numerics import (
    MXFloatCodec,
    MXIntCodec,
    codec_of,
    dequantize,
    fake_quantize,
    quantize,
)
from bittern.numerics.stored import e4m3_scales, e8m0_bytes, e8m0_scales
from bittern.records import NumberFormat, PerBlock, PerGroup, QuantizerSpec

LARGEST = {
    "mxfp8": 448.0,
    "mxfp8-e5m2": 57344.0,
    "mxfp6": 28.0,
    "mxfp6-e2m3": 7.5,
    "mxfp4": 6.0,
    "mxint8": 127.0,
}
BY_NAME = {item.name: item for item in FORMATS}
by_name = pytest.mark.parametrize("name", LARGEST)

positive = st.floats(width=32, min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def edges(draw: st.DrawFn) -> float:
    """Draw where exponents change: powers of two, those times the largest element, and beside."""
    power, largest = draw(st.integers(-126, 100)), draw(st.sampled_from([1.0, *LARGEST.values()]))
    value = np.float32(2.0**power * largest)
    to = draw(st.sampled_from([np.float32(0), value, np.float32(np.inf)]))
    return float(np.nextafter(value, to))


def made(name: str, rounding: str) -> NumberFormat:
    base = BY_NAME[name]
    params = {**base.params, "scale_rounding": rounding}
    return NumberFormat(name=name, bits=base.bits, codec=base.codec, params=params, scale_bits=8)


def ceil_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    while Fraction(2) ** exponent < value:
        exponent += 1
    while Fraction(2) ** (exponent - 1) >= value:
        exponent -= 1
    return exponent


@by_name
@given(amax=positive | edges())
def test_exponents_are_rounded_up_exactly(name: str, amax: float) -> None:
    codec = codec_of(BY_NAME[name])
    ratio = np.float32(amax) / np.float32(LARGEST[name])  # the one rounded operation of the rule
    expected = -127 if ratio == 0 else max(-127, ceil_log2(Fraction(float(ratio))))

    scale = codec.scales(torch.tensor(amax)).scale
    assert scale.dtype == torch.float32
    assert Fraction(scale.item()) == Fraction(2) ** expected


@by_name
@given(amax=positive | edges())
def test_the_rule_of_ocp_rounds_down_from_the_largest_power_of_the_elements(
    name: str, amax: float
) -> None:
    codec = codec_of(made(name, "floor"))
    floor = math.frexp(amax)[1] - 1
    largest = math.frexp(LARGEST[name])[1] - 1

    found = codec.scales(torch.tensor(amax)).scale.item()
    assert Fraction(found) == Fraction(2) ** max(-127, floor - largest)


@by_name
def test_an_exact_power_is_not_bumped(name: str) -> None:
    codec = codec_of(BY_NAME[name])
    powers = torch.arange(-100, 100)
    amax = torch.ldexp(torch.full((200,), LARGEST[name]), powers)
    amax = amax[amax.isfinite()]
    up = torch.nextafter(amax, torch.tensor(math.inf))

    exact = torch.exp2(powers[: len(amax)].double()).float()
    assert torch.equal(codec.scales(amax).scale, exact)
    assert torch.equal(codec.scales(up * (1 + 2.0**-22)).scale, 2 * exact)


@by_name
def test_no_element_saturates_when_exponents_are_rounded_up(name: str) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).exp()
    scales = quantize(x, QuantizerSpec(BY_NAME[name], PerGroup(32))).scales

    assert bool((x <= scales.scale * LARGEST[name]).all())
    assert bool((x.amax(1, keepdim=True) > scales.scale * LARGEST[name] / 2).all())


@by_name
@pytest.mark.parametrize("granularity", [PerGroup(32), PerBlock(4, 8)], ids=str)
def test_mse_takes_per_block_the_rule_with_the_smaller_error(
    name: str, granularity: PerGroup | PerBlock
) -> None:
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    results = {
        rounding: fake_quantize(x, QuantizerSpec(made(name, rounding), granularity)).double()
        for rounding in ("ceil", "floor", "mse")
    }

    def errors(values: Tensor) -> Tensor:
        squares = (values - x.double()).square()
        if isinstance(granularity, PerGroup):
            return squares.unflatten(1, (-1, 32)).sum(-1)
        return squares.unflatten(1, (-1, 8)).unflatten(0, (-1, 4)).sum((1, 3))

    found = {rounding: errors(values) for rounding, values in results.items()}
    best = torch.minimum(found["ceil"], found["floor"])
    assert torch.allclose(found["mse"], best, rtol=1e-6, atol=0)
    if name == "mxfp4":  # both rules win somewhere, or this test shows nothing
        assert bool((found["ceil"] < found["floor"]).any())
        assert bool((found["ceil"] > found["floor"]).any())


@by_name
def test_a_block_of_zeros_has_exponent_zero_beside_others(name: str) -> None:
    x = torch.zeros(2, 64)
    x[1, :32] = 3.0
    packed = quantize(x, QuantizerSpec(BY_NAME[name], PerGroup(32)))

    assert packed.scales.scale[0].tolist() == [1, 1]
    assert packed.scales.scale[1, 1] == 1
    assert not bool(dequantize(packed)[1, 32:].any())


@by_name
@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-133, 2.0**-127, 1.5 * 2.0**-126])
def test_tiny_blocks_have_the_smallest_exponents_and_lose_nothing_to_them(
    name: str, amax: float
) -> None:
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([amax, -amax, amax / 2])
    packed = quantize(x, QuantizerSpec(BY_NAME[name], PerGroup(32)))

    scale = packed.scales.scale.item()
    assert Fraction(scale) >= Fraction(1, 2**127)
    for value, found in zip(x[0].tolist(), dequantize(packed)[0].tolist(), strict=True):
        assert abs(Fraction(found) - Fraction(value)) <= Fraction(scale) / 2 * max(
            1, Fraction(LARGEST[name]) / 8
        )
    assert bool(packed.scales.scale.isfinite().all())


@by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_rounded_up_beyond_its_dtype_saturates(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, *[0.0] * 30]], dtype=dtype)
    spec = QuantizerSpec(BY_NAME[name], PerGroup(32))
    found = fake_quantize(x, spec)

    assert bool(found.isfinite().all())
    assert float(found[0, 0]) >= 0.98 * largest
    assert torch.equal(found, dequantize(quantize(x, spec)))


@by_name
def test_nan_and_inf_take_their_block_and_no_other(name: str) -> None:
    x = torch.ones(1, 96)
    x[0, 0], x[0, 40] = math.inf, math.nan
    found = fake_quantize(x, QuantizerSpec(BY_NAME[name], PerGroup(32)))

    assert bool(found[0, :64].isnan().all())
    assert bool(found[0, 64:].isfinite().all())


# --- bytes ----------------------------------------------------------------------------------------


def test_every_byte_of_a_scale_and_back_as_in_ml_dtypes() -> None:
    dtypes: Any = pytest.importorskip("ml_dtypes")
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    scales = e8m0_scales(bytes_)

    theirs = bytes_.numpy().view(dtypes.float8_e8m0fnu).astype(np.float32)
    assert torch.equal(scales[:255], torch.from_numpy(theirs[:255]))
    assert bool(scales[255].isnan())
    assert torch.equal(e8m0_bytes(scales[:255]), bytes_[:255])
    assert torch.equal(bytes_.view(torch.float8_e8m0fnu).float()[:255], scales[:255])


@pytest.mark.parametrize("scale", [0.0, 3.0, 2.0**-128, math.inf, math.nan, -2.0, 1.0000001])
def test_what_is_no_power_of_two_has_no_byte(scale: float) -> None:
    with pytest.raises(NumericsError, match="powers of two"):
        e8m0_bytes(torch.tensor([1.0, scale]))


def test_block_scales_of_nvfp4_are_stored_exactly_or_refused() -> None:
    scales = torch.tensor([2.0**-9, 1.0, 448.0])

    assert torch.equal(e4m3_scales(scales).float(), scales)
    for bad in (449.0, 0.3, math.nan):
        with pytest.raises(NumericsError, match="no e4m3 number"):
            e4m3_scales(torch.tensor([bad]))


# --- what is refused ------------------------------------------------------------------------------


def test_unknown_elements_and_roundings_are_refused() -> None:
    with pytest.raises(NumericsError, match="no elements 'e1m2'"):
        MXFloatCodec("e1m2")
    for make in (MXFloatCodec, MXIntCodec):
        with pytest.raises(NumericsError, match="no scale_rounding 'nearest'"):
            make(scale_rounding="nearest")
