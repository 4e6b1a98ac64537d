"""NVFP4: the rule of two levels against a loop, four over six against both choices, its edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.builtin.formats import FORMATS
from bittern.errors import NumericsError
from bittern.numerics import (
    Quantized,
    Range,
    Scales,
    codec_of,
    dequantize,
    fake_quantize,
    quantize,
    scales_for,
    scales_from_amax,
)
from bittern.records import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantizerSpec

SameBits = Callable[[Tensor, Tensor], bool]

BY_NAME = {item.name: item for item in FORMATS}
NVFP4 = QuantizerSpec(BY_NAME["nvfp4"], PerGroup(16))
FITTED = QuantizerSpec(BY_NAME["nvfp4-four-over-six"], PerGroup(16))
by_spec = pytest.mark.parametrize("spec", [NVFP4, FITTED], ids=lambda s: s.format.name)

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # the code is the index
E4M3 = sorted(
    {m * 2.0**-9 for m in range(8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} - {480.0}
)


def nearest(value: float, points: list[float]) -> int:
    """Return the index of the nearest point, the even one on a tie."""
    distances = [abs(value - point) for point in points]
    best = min(distances)
    found = [i for i, distance in enumerate(distances) if distance == best]
    return next((i for i in found if i % 2 == 0), found[0])


def oracle(x: np.ndarray, largest_scale: float) -> tuple[list[list[int]], np.ndarray, np.float32]:
    """Return codes, block scales and the global scale of rows of whole blocks."""
    f32 = np.float32
    g = f32(np.abs(x).max()) / f32(6 * largest_scale)
    scales = np.ones((x.shape[0], x.shape[1] // 16), f32)
    codes = []
    for i, row in enumerate(x):
        codes.append([])
        for j in range(len(row) // 16):
            block = row[16 * j : 16 * j + 16]
            amax = f32(np.abs(block).max())
            if amax:
                ratio = np.clip(amax / (f32(6) * g), f32(2**-9), f32(448))
                scales[i, j] = E4M3[nearest(float(ratio), E4M3)]
            step = scales[i, j] * g
            for value in block:
                code = nearest(min(abs(float(value / step)), 6.0), MAGNITUDES)
                codes[-1].append(code + 8 * (value < 0 and code > 0))
    return codes, scales, g


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.0, 1.0, 4.0, 12.0]))
def test_codes_and_both_scales_are_those_of_the_rule(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 48)) * np.exp2(spread * rng.standard_normal((3, 48)))
    x[rng.random((3, 48)) < 0.1] = 0
    x[0, :16] = 0
    x = x.astype(np.float32)

    codes, scales, g = oracle(x, 448)
    packed = quantize(torch.from_numpy(x), NVFP4)

    assert packed.scales.global_scale is not None
    assert packed.scales.global_scale.item() == g
    assert torch.equal(packed.scales.scale, torch.from_numpy(scales))
    assert packed.codes.tolist() == codes


def test_the_ratio_of_a_block_scale_is_divided_once() -> None:
    """Beside the middles of e4m3 numbers ``amax / (6 * g)`` and ``amax / g / 6`` round apart."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(E4M3)])
    codec, apart = codec_of(NVFP4.format), 0
    for g in torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.01:
        amax = middles * (6 * g)
        amax = torch.cat([amax, torch.nextafter(amax, amax * 2), torch.nextafter(amax, amax / 2)])
        ratio = amax.numpy() / (np.float32(6) * g.numpy())
        expected = torch.from_numpy(ratio).to(torch.float8_e4m3fn).float().clamp_min(2.0**-9)
        assert torch.equal(codec.scales(amax, g).scale, expected)
        other = torch.from_numpy(amax.numpy() / g.numpy() / np.float32(6))
        apart += int((other.to(torch.float8_e4m3fn).float().clamp_min(2.0**-9) != expected).sum())
    assert apart > 0  # or this test shows nothing


def test_ties_between_codes_go_to_the_even_one() -> None:
    x = torch.zeros(1, 16)
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    x[0, :7] = torch.tensor(middles)
    x[0, 15] = 6.0
    scales = Scales(torch.ones(1, 1), global_scale=torch.tensor(1.0))

    assert fake_quantize(x, NVFP4, scales)[0, :7].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert fake_quantize(-x, NVFP4, scales)[0, :7].tolist() == [0, -1, -1, -2, -2, -4, -4]


@by_spec
def test_a_tensor_of_zeros_has_scales_of_one(spec: QuantizerSpec, same_bits: SameBits) -> None:
    packed = quantize(-torch.zeros(2, 40), spec)

    assert packed.scales.global_scale is not None
    assert packed.scales.global_scale.item() == 1
    assert packed.scales.scale.tolist() == [[1, 1, 1]] * 2
    assert not bool(packed.codes.any())
    assert same_bits(dequantize(packed), torch.zeros(2, 40))


@by_spec
def test_a_block_of_zeros_and_a_tiny_block_beside_a_large_one(spec: QuantizerSpec) -> None:
    x = torch.zeros(1, 48)
    x[0, 16:32], x[0, 32:] = 1e-20, 100.0
    packed = quantize(x, spec)

    assert packed.scales.scale[0, :2].tolist() == [1, 2.0**-9]
    assert not bool(packed.codes[0, :32].any())
    assert bool((dequantize(packed)[0, 32:] == 100).all())


@by_spec
@pytest.mark.parametrize("value", [2.0**-149, 1e-43, 1e-40, 1e-38, 1e38, 3.4e38])
def test_the_ends_of_float32_stay_finite_and_close(spec: QuantizerSpec, value: float) -> None:
    x = torch.tensor([[value, -value] * 8 + [value / 2] * 16])
    packed = quantize(x, spec)
    found = dequantize(packed)

    assert bool(found.isfinite().all())
    assert bool((packed.scales.step > 0).all())
    assert float((found - x).abs().max() / value) <= (0.07 if value > 1e-37 else 1.0)


@by_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_rounded_up_beyond_its_dtype_saturates(
    spec: QuantizerSpec, dtype: torch.dtype, same_bits: SameBits
) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.linspace(0.5, 1.0, 64).double().outer(torch.ones(16).double()) * largest
    x = rows.to(dtype)
    found = fake_quantize(x, spec)

    assert bool(found.isfinite().all())
    assert same_bits(found, dequantize(quantize(x, spec)))


def test_a_static_global_scale_leaves_the_block_scales_to_each_tensor(
    same_bits: SameBits,
) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    g = codec_of(NVFP4.format).global_scale(torch.tensor(8.0))

    packed = quantize(x, NVFP4, global_scale=g)
    assert packed.scales.global_scale is g
    assert same_bits(fake_quantize(x, NVFP4, global_scale=g), dequantize(packed))
    blocks = x.unflatten(1, (-1, 16)).abs().amax(-1)
    expected = (blocks / (6 * g)).to(torch.float8_e4m3fn).float()
    assert torch.equal(packed.scales.scale, expected)
    louder = fake_quantize(100 * x, NVFP4, global_scale=g)
    assert float(louder.abs().max()) == pytest.approx(8.0)  # saturates at its range


def test_stacked_tensors_have_a_global_scale_each(same_bits: SameBits) -> None:
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 100.0, 0.0])[:, None, None]
    stacked = QuantizerSpec(NVFP4.format, PerGroup(16), stacked=True)
    packed = quantize(x, stacked)

    assert packed.scales.global_scale is not None
    assert packed.scales.global_scale.shape == (3, 1, 1)
    for each, codes, whole in zip(x, packed.codes, fake_quantize(x, stacked), strict=True):
        assert torch.equal(codes, quantize(each, NVFP4).codes)
        assert same_bits(whole.contiguous(), fake_quantize(each, NVFP4))


def test_scales_of_a_range_are_those_of_its_tensor() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    blocks = x.unflatten(1, (-1, 16)).abs().amax(-1)

    found, expected = scales_from_amax(blocks, NVFP4), quantize(x, NVFP4).scales
    assert torch.equal(found.step, expected.step)
    wider = scales_for(Range(blocks, global_amax=torch.tensor(1e3)), NVFP4)
    assert wider.global_scale is not None
    assert wider.global_scale.item() == (torch.tensor(1e3) / 2688).item()


# --- four over six --------------------------------------------------------------------------------


def errors_of(x: Tensor, values: Tensor) -> Tensor:
    return (values.double() - x.double()).square().unflatten(1, (-1, 16)).sum(-1)


def test_a_block_takes_the_better_of_six_and_four() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize(x, FITTED)
    scales = packed.scales
    assert scales.global_scale is not None
    assert scales.global_scale.item() == (x.abs().max() / (6 * 256)).item()

    blocks = x.unflatten(1, (-1, 16)).abs().amax(-1)
    errors = {}
    for largest in (6, 4):
        block = (blocks / (largest * scales.global_scale)).to(torch.float8_e4m3fn).float()
        given = Scales(block, global_scale=scales.global_scale)
        errors[largest] = errors_of(x, fake_quantize(x, FITTED, given))
    best = torch.minimum(errors[6], errors[4])
    assert torch.allclose(errors_of(x, dequantize(packed)), best, rtol=1e-6, atol=0)
    share = float((errors[4] < errors[6]).double().mean())
    assert 0.1 < share < 0.9  # both win somewhere


def test_four_over_six_beats_nvfp4_on_normal_numbers() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    plain, fitted = (errors_of(x, fake_quantize(x, spec)).sum() for spec in (NVFP4, FITTED))

    assert float(fitted) < 0.97 * float(plain)


def test_a_tie_takes_six() -> None:
    x = torch.zeros(1, 16)
    x[0, 0] = 1.0  # 6 and 4 are both exact
    packed = quantize(torch.cat([x, 256 * x]), FITTED)

    assert packed.codes[0, 0] == 7


def test_the_choice_for_a_block_does_not_depend_on_other_blocks() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) * 2.0**-60
    g = codec_of(FITTED.format).global_scale(x.abs().max())
    alone = quantize(x, FITTED, global_scale=g)
    loud = torch.full((1, 64), 1e30)
    beside = quantize(torch.cat([x, loud]), FITTED, global_scale=g)

    assert torch.equal(beside.scales.scale[:8], alone.scales.scale)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nvfp4", "nvfp4-four-over-six", "mxfp8", "mxfp6", "mxfp4", "mxint8", "nf4"]
)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerToken()], ids=str)
def test_formats_of_blocks_refuse_coarser_scales(
    name: str, granularity: PerTensor | PerChannel | PerToken
) -> None:
    spec = QuantizerSpec(BY_NAME[name], granularity)
    x = torch.ones(2, 32)
    for call in (
        lambda: fake_quantize(x, spec),
        lambda: quantize(x, spec),
        lambda: fake_quantize(x, spec, Scales(torch.tensor(1.0))),
        lambda: scales_from_amax(torch.tensor(1.0), spec),
    ):
        with pytest.raises(NumericsError, match=f"{name} has one scale per group or block"):
            call()


def test_block_scales_alone_are_half_of_the_scales() -> None:
    with pytest.raises(NumericsError, match="needs a global scale beside its scales"):
        fake_quantize(torch.ones(1, 16), NVFP4, Scales(torch.ones(1, 1)))


@pytest.mark.parametrize("bad", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4", "mxfp4", "nf4"])
def test_a_range_that_is_negative_or_nan_is_refused(name: str, bad: float) -> None:
    spec = QuantizerSpec(BY_NAME[name], PerBlock(1, 16))
    with pytest.raises(NumericsError, match="negative or NaN"):
        scales_from_amax(torch.tensor([[1.0, bad]]), spec)


def test_codes_of_others_with_a_negative_zero_decode_to_zero() -> None:
    codes = torch.full((1, 16), 8, dtype=torch.uint8)
    scales = Scales(torch.ones(1, 1), global_scale=torch.tensor(1.0))

    assert not bool(dequantize(Quantized(codes, scales, NVFP4, torch.float32)).any())
