"""The law: fake_quantize(x) == dequantize(quantize(x)), bit for bit, and what holds beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.builtin.formats import FORMATS
from bittern.numerics import (
    Range,
    amax,
    codec_of,
    dequantize,
    fake_quantize,
    measure,
    quantize,
    scale_shape,
    scales_for,
)
from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

# Every format that core registers, and what their codecs can do beside.
BY_NAME = {item.name: item for item in FORMATS}
BY_NAME |= {
    f"{name}-{'-'.join(map(str, params))}": replace(
        BY_NAME[name], params={**BY_NAME[name].params, **params}
    )
    for name, params in [
        ("int2", {"narrow": True}),
        ("int4", {"narrow": True}),
        ("int8", {"narrow": True}),
        ("int3", {"narrow": True, "asymmetric": True}),
    ]
}
BY_NAME |= {
    f"{name}-{rounding}": replace(
        BY_NAME[name], params={**BY_NAME[name].params, "scale_rounding": rounding}
    )
    for name in ("mxfp8", "mxfp6-e2m3", "mxfp4", "mxint8")
    for rounding in ("floor", "mse")
}
NAMES = sorted(BY_NAME)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGEST = float(torch.finfo(torch.float32).max)

EXAMPLES = settings.default.max_examples // 2

SameBits = Callable[[Tensor, Tensor], bool]
SIZES = st.integers(1, 9)
FINE = st.one_of(
    st.builds(PerGroup, SIZES),
    st.builds(PerGroup, SIZES, axis=st.sampled_from([0, -2])),
    st.builds(PerBlock, SIZES, SIZES),
)
COARSE = st.sampled_from(
    [PerTensor(), PerChannel(0), PerChannel(1), PerChannel(-1), PerChannel((0, 1)), PerToken()]
)


@st.composite
def specs(draw: st.DrawFn) -> QuantizerSpec:
    found = BY_NAME[draw(st.sampled_from(NAMES))]
    return QuantizerSpec(found, draw(FINE if found.block_only else FINE | COARSE))


def fitting(x: Tensor, spec: QuantizerSpec) -> Tensor:
    return x if codec_of(spec.format).signed else x.abs()


def values(rng: np.random.Generator, count: int, style: str) -> np.ndarray:
    """Return adversarial float32 values."""
    normal = rng.standard_normal(count).astype(np.float32)
    sign = rng.choice(np.array([-1, 1], np.float32), count)
    with np.errstate(over="ignore", under="ignore"):
        match style:
            case "normal":
                return normal
            case "ties":  # halves of a step of every integer format, exact in every dtype
                return (sign * (rng.integers(0, 129, count) - 0.5)).astype(np.float32)
            case "zeros":
                return sign * 0
            case "sparse":
                return normal * rng.integers(0, 2, count).astype(np.float32)
            case "subnormal":
                return sign * rng.integers(0, 300, count).astype(np.float32) * np.float32(2**-149)
            case "tiny":
                return normal * np.float32(1e-38)
            case "huge":
                return (normal * np.float32(1e38)).clip(-LARGEST, LARGEST)
            case "extreme":
                pool = [0.0, LARGEST, 1e38, 1e-38, 65504.0, 6e-8, 1.0, 2.0**-149, 448.0, 57344.0]
                return sign * rng.choice(np.array(pool, np.float32), count)
    return normal * np.float32(10.0) ** rng.integers(-38, 37, count).astype(np.float32)  # mixed


STYLES = ["normal", "ties", "zeros", "sparse", "subnormal", "tiny", "huge", "extreme", "mixed"]


@st.composite
def tensors(draw: st.DrawFn, *, rank: int = 0) -> Tensor:
    """Draw a finite tensor of 0 to 5 dimensions, contiguous or not, maybe empty."""
    dims = draw(st.integers(rank, 5))
    shape = tuple(draw(st.integers(0, 7)) for _ in range(dims))
    dtype = draw(st.sampled_from(DTYPES))
    style = draw(st.sampled_from(STYLES))
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    limit = min(float(torch.finfo(dtype).max), LARGEST)  # float16 would overflow

    def make(size: tuple[int, ...]) -> Tensor:
        made = values(rng, int(np.prod(size)), style).clip(-limit, limit).reshape(size)
        return torch.from_numpy(made).to(dtype)

    if dims and layout == "transposed":
        return make(shape[::-1]).permute(*reversed(range(dims)))
    if dims and layout == "strided":
        return make((*shape[:-1], shape[-1] * 2))[..., ::2]
    if dims and layout == "expanded":
        return make((1, *shape[1:])).expand(shape)
    return make(shape)


def rank_of(granularity: Granularity) -> int:
    match granularity:
        case PerTensor():
            return 0
        case PerChannel(axis=1) | PerChannel(axis=(0, 1)) | PerGroup(axis=-2) | PerBlock():
            return 2
    return 1


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, QuantizerSpec]:
    spec = draw(specs())
    return fitting(draw(tensors(rank=rank_of(spec.granularity))), spec), spec


def assert_no_negative_zero(x: Tensor) -> None:
    assert not bool((torch.signbit(x) & (x == 0)).any())


@settings(max_examples=24 * EXAMPLES)
@given(case=cases())
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(
    case: tuple[Tensor, QuantizerSpec], same_bits: SameBits
) -> None:
    x, spec = case
    before = x.clone()

    faked = fake_quantize(x, spec)
    packed = quantize(x, spec)
    decoded = dequantize(packed)

    assert same_bits(faked, decoded)
    assert same_bits(x, before), "the input was modified"
    assert faked.dtype == x.dtype
    assert faked.shape == x.shape
    assert_no_negative_zero(faked)
    if not x.numel() or float(x.abs().max()) < LARGEST:  # 127 * fl(LARGEST / 127) is beyond it
        assert bool(torch.isfinite(faked).all())

    codec = codec_of(spec.format)
    assert packed.codes.dtype == codec.storage
    assert packed.codes.shape == x.shape
    assert packed.codes.is_contiguous()
    scale = packed.scales.scale
    assert scale.dtype == torch.float32
    assert scale.shape == scale_shape(x.shape, spec.granularity)
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert bool((packed.scales.step > 0).all())


@settings(max_examples=12 * EXAMPLES)
@given(case=cases(), factor=st.sampled_from([1e-3, 0.3, 0.999, 1.0, 1.5, 40.0]))
def test_the_law_holds_with_static_scales_that_clip_or_are_too_wide(
    case: tuple[Tensor, QuantizerSpec], factor: float, same_bits: SameBits
) -> None:
    x, spec = case
    ends = measure(x, spec)

    def shrunk(values: Tensor | None) -> Tensor | None:
        return None if values is None else (values.double() * factor).clamp(-1e37, 1e37).float()

    high = shrunk(ends.amax)
    assert high is not None
    scales = scales_for(Range(high, shrunk(ends.amin), shrunk(ends.global_amax)), spec, x)

    assert same_bits(fake_quantize(x, spec, scales), dequantize(quantize(x, spec, scales)))


@settings(max_examples=8 * EXAMPLES)
@given(case=cases())
def test_quantizing_twice_with_the_same_scales_changes_nothing_more(
    case: tuple[Tensor, QuantizerSpec], same_bits: SameBits
) -> None:
    x, spec = case
    x = x.float().clamp(-1e37, 1e37)
    x = torch.where(x.abs() < 1e-30, 0.0, x)  # below, code * scale / scale is no code again
    packed = quantize(x, spec)
    once = dequantize(packed)

    assert same_bits(fake_quantize(once, spec, packed.scales), once)


@given(
    elements=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12
    ),
    name=st.sampled_from(NAMES),
    size=st.integers(1, 5),
)
def test_the_law_holds_for_any_floats(
    elements: list[float], name: str, size: int, same_bits: SameBits
) -> None:
    spec = QuantizerSpec(BY_NAME[name], PerGroup(size))
    x = fitting(torch.tensor(elements, dtype=torch.float32), spec)

    faked = fake_quantize(x, spec)

    assert same_bits(faked, dequantize(quantize(x, spec)))
    assert_no_negative_zero(faked)


@pytest.mark.parametrize("name", ["int8", "int4-narrow", "fp8", "fp8-e5m2"])
@pytest.mark.parametrize(
    "granularity",
    [PerTensor(), PerChannel(0), PerChannel(-1), PerToken(), PerGroup(5), PerBlock(3, 4)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_half_a_step(
    name: str, granularity: Granularity, dtype: torch.dtype
) -> None:
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = QuantizerSpec(BY_NAME[name], granularity)
    error = (fake_quantize(x, spec).double() - x.double()).abs()

    steps = {"int8": 1 / 127, "int4-narrow": 1 / 7, "fp8": 32 / 448, "fp8-e5m2": 8192 / 57344}
    largest = x.abs().double().max()
    rounding = torch.finfo(dtype).eps * largest
    assert bool((error <= 0.5 * steps[name] * largest * 1.0001 + rounding).all())


@settings(max_examples=8 * EXAMPLES)
@given(case=cases())
def test_float64_is_computed_as_float32(
    case: tuple[Tensor, QuantizerSpec], same_bits: SameBits
) -> None:
    x, spec = case
    wide = fake_quantize(x.double(), spec)

    assert wide.dtype == torch.float64
    assert same_bits(wide.float(), fake_quantize(x.float(), spec))


@settings(max_examples=8 * EXAMPLES)
@given(case=cases())
def test_strides_do_not_matter(case: tuple[Tensor, QuantizerSpec], same_bits: SameBits) -> None:
    x, spec = case

    assert same_bits(fake_quantize(x, spec), fake_quantize(x.contiguous(), spec))
    assert same_bits(amax(x, spec.granularity), amax(x.contiguous(), spec.granularity))
