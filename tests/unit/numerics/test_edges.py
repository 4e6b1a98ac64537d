"""Zero, underflow, NaN, Inf, wrong input: what the rule says at its edges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bittern.errors import NumericsError, PluginError
from bittern.numerics import (
    FloatCodec,
    IntCodec,
    Scales,
    amax,
    codec_of,
    dequantize,
    fake_quantize,
    quantize,
    scale_shape,
    scales_from_amax,
)
from bittern.records import (
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

SameBits = Callable[[Tensor, Tensor], bool]
MakeSpec = Callable[..., QuantizerSpec]

NAMES = ["int2", "int4", "int8", "int8n", "fp8", "fp8_e5m2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(-1),
    PerToken(),
    PerGroup(3),
    PerBlock(2, 3),
]
by_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
by_name = pytest.mark.parametrize("name", NAMES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- zero -----------------------------------------------------------------------------------------


@by_name
@by_dtype
@by_granularity
def test_zeros_have_scale_one_and_codes_zero_and_stay_plus_zero(
    name: str,
    dtype: torch.dtype,
    granularity: Granularity,
    make_spec: MakeSpec,
    same_bits: SameBits,
) -> None:
    x = torch.zeros(4, 7, dtype=dtype)
    x[::2] = -0.0
    packed = quantize(x, make_spec(name, granularity))

    assert bool((packed.scales.scale == 1).all())
    assert bool((packed.codes.view(torch.uint8) == 0).all())
    for result in (dequantize(packed), fake_quantize(x, make_spec(name, granularity))):
        assert same_bits(result, torch.zeros(4, 7, dtype=dtype))


@by_name
def test_a_zero_row_beside_others_is_treated_alone(name: str, make_spec: MakeSpec) -> None:
    x = torch.tensor([[1.5, -2.0], [0.0, -0.0], [1e-40, -1e-40]])
    packed = quantize(x, make_spec(name, PerChannel(0)))

    assert packed.scales.scale[1].item() == 1
    assert packed.codes[1].float().tolist() == [0, 0]
    assert bool((packed.codes[::2].float() != 0).all())


@by_granularity
def test_the_amax_of_zeros_is_plus_zero(granularity: Granularity, same_bits: SameBits) -> None:
    for zeros in (torch.zeros(2, 2), -torch.zeros(2, 2), torch.tensor([[0.0, -0.0], [-0.0, 0.0]])):
        found = amax(zeros, granularity)
        assert same_bits(found, torch.zeros_like(found))


@by_name
def test_what_rounds_to_zero_from_below_is_plus_zero(name: str, make_spec: MakeSpec) -> None:
    x = torch.tensor([1.0, -1e-11, -1e-30, -0.0])
    result = fake_quantize(x, make_spec(name))

    assert result[1:].tolist() == [0, 0, 0]
    assert not bool(torch.signbit(result[1:]).any())


# --- underflow and overflow -----------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("smallest", [2.0**-149, 3 * 2.0**-149, 2.0**-140, 1e-40, 2.0**-127])
def test_a_subnormal_range_gives_a_positive_finite_scale(
    name: str, smallest: float, make_spec: MakeSpec
) -> None:
    x = torch.tensor([smallest, -smallest, 0.0])
    packed = quantize(x, make_spec(name))
    result = dequantize(packed)

    assert 2.0**-149 <= packed.scales.scale.item() <= smallest
    assert bool(torch.isfinite(result).all())
    assert abs(result[0].item() - smallest) <= smallest / 2
    assert abs(result[1].item() + smallest) <= smallest / 2
    assert result[2].item() == 0


@by_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_largest_number_of_a_dtype_stays_finite(
    name: str, dtype: torch.dtype, make_spec: MakeSpec
) -> None:
    largest = torch.finfo(dtype).max if dtype != torch.float64 else 3.0e38
    x = torch.tensor([largest, -largest, 1.0], dtype=dtype)

    assert bool(torch.isfinite(fake_quantize(x, make_spec(name))).all())


@by_name
def test_static_scales_saturate_what_lies_beyond(name: str, make_spec: MakeSpec) -> None:
    spec = make_spec(name)
    codec = codec_of(spec.format)
    scales = codec.scales(torch.tensor(2.0))
    result = fake_quantize(torch.tensor([2.0, 1e38, -1e38]), spec, scales)

    low = getattr(codec, "min_value", -codec.max_value) * scales.scale
    assert result[0] == result[1] == codec.max_value * scales.scale
    assert result[2] == low


# --- NaN and Inf ----------------------------------------------------------------------------------


@by_name
@by_dtype
@by_granularity
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_show_in_the_result_and_are_refused_by_quantize(
    name: str,
    dtype: torch.dtype,
    granularity: Granularity,
    bad: float,
    make_spec: MakeSpec,
) -> None:
    x = torch.ones(4, 7, dtype=dtype)
    x[1, 2] = bad
    spec = make_spec(name, granularity)

    assert not bool(torch.isfinite(fake_quantize(x, spec)[1, 2]))
    assert not bool(torch.isfinite(amax(x, granularity)).all())
    with pytest.raises(NumericsError, match="NaN or Inf"):
        quantize(x, spec)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        quantize(x, spec, Scales(torch.ones(scale_shape(x.shape, granularity))))


@by_granularity
def test_nan_stays_in_its_own_group(granularity: Granularity, make_spec: MakeSpec) -> None:
    x = torch.ones(4, 7)
    x[1, 2] = float("nan")
    bad = torch.isnan(fake_quantize(x, make_spec("int8", granularity)))

    expected = {
        "tensor": 28,
        "channel": 7,
        "channel[-1]": 4,
        "token": 7,
        "group[3]": 3,
        "block[2x3]": 6,
    }
    assert int(bad.sum()) == expected[str(granularity)]
    assert bool(bad[1, 2])


@by_name
def test_nan_shows_under_static_scales(name: str, make_spec: MakeSpec) -> None:
    x = torch.tensor([float("nan"), 1.0])
    result = fake_quantize(x, make_spec(name), Scales(torch.tensor(0.5)))

    assert result.isnan().tolist() == [True, False]


def test_a_float64_beyond_float32_is_refused_instead_of_becoming_garbage(
    make_spec: MakeSpec,
) -> None:
    x = torch.tensor([1e300, 1.0], dtype=torch.float64)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        quantize(x, make_spec("int8"))


# --- what cannot be quantized ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
@pytest.mark.parametrize("numel", [0, 3])
def test_other_dtypes_are_refused(dtype: torch.dtype, numel: int, make_spec: MakeSpec) -> None:
    x = torch.zeros(numel).to(dtype)
    spec = make_spec("int8")
    scales = Scales(torch.tensor(1.0))
    for call in (
        lambda: amax(x, PerTensor()),
        lambda: fake_quantize(x, spec),
        lambda: fake_quantize(x, spec, scales),
        lambda: quantize(x, spec),
        lambda: quantize(x, spec, scales),
    ):
        with pytest.raises(NumericsError, match="cannot quantize a tensor of dtype"):
            call()


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerTensor(), (1,)),
        (PerTensor(), (4, 1)),
        (PerChannel(0), ()),
        (PerChannel(0), (4,)),
        (PerChannel(0), (1, 6)),
        (PerChannel(0), (3, 1)),
        (PerChannel(1), (4, 1)),
        (PerToken(), (4,)),
        (PerGroup(4), (4, 1)),
        (PerGroup(4), (4, 6)),
        (PerGroup(4), (4, 2, 1)),
        (PerBlock(2, 3), (2,)),
        (PerBlock(2, 3), (4, 6)),
    ],
    ids=str,
)
def test_scales_of_another_shape_are_refused(
    granularity: Granularity, shape: tuple[int, ...], make_spec: MakeSpec
) -> None:
    x = torch.ones(4, 6)
    spec = make_spec("int8", granularity)
    for function in (fake_quantize, quantize):
        with pytest.raises(NumericsError, match="do not fit a tensor of shape"):
            function(x, spec, Scales(torch.ones(shape)))


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerChannel(0), ()),
        (PerChannel(1), (3,)),
        (PerChannel(-2), (3,)),
        (PerToken(), ()),
        (PerGroup(4), ()),
        (PerBlock(2, 2), (3,)),
    ],
    ids=str,
)
def test_too_few_dimensions_are_refused(
    granularity: Granularity, shape: tuple[int, ...], make_spec: MakeSpec
) -> None:
    x = torch.ones(shape)
    for call in (
        lambda: amax(x, granularity),
        lambda: scale_shape(shape, granularity),
        lambda: quantize(x, make_spec("int8", granularity)),
        lambda: fake_quantize(x, make_spec("int8", granularity)),
    ):
        with pytest.raises(NumericsError, match="dimensions has no granularity"):
            call()


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_integers_of_other_widths_do_not_exist(bits: int) -> None:
    with pytest.raises(NumericsError, match="2 to 8 bits"):
        IntCodec(bits)


# --- purity ---------------------------------------------------------------------------------------


@by_name
@by_dtype
@by_granularity
def test_the_input_is_never_written_to_and_shares_no_memory_with_the_result(
    name: str,
    dtype: torch.dtype,
    granularity: Granularity,
    make_spec: MakeSpec,
    same_bits: SameBits,
) -> None:
    x = torch.linspace(-3, 5, 28).reshape(4, 7).to(dtype)
    before, version = x.clone(), x._version
    spec = make_spec(name, granularity)

    faked, packed = fake_quantize(x, spec), quantize(x, spec)
    codes = packed.codes.clone()
    decoded = dequantize(packed)
    decoded.zero_()
    faked.zero_()

    assert x._version == version
    assert same_bits(x, before)
    assert same_bits(packed.codes, codes)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty_tensors_come_back_empty(
    granularity: Granularity, shape: tuple[int, ...], make_spec: MakeSpec
) -> None:
    if len(shape) < 2 and isinstance(granularity, PerBlock):
        shape = (*shape, 3)
    x = torch.empty(shape, dtype=torch.bfloat16)
    spec = make_spec("fp8", granularity)
    packed = quantize(x, spec)

    assert amax(x, granularity).tolist() == torch.zeros(scale_shape(shape, granularity)).tolist()
    assert packed.codes.shape == shape
    for result in (fake_quantize(x, spec), dequantize(packed)):
        assert result.shape == shape
        assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("granularity", [PerGroup(4), PerBlock(3, 4)], ids=str)
def test_a_partial_group_gives_a_contiguous_result_of_its_own_size(
    granularity: Granularity, make_spec: MakeSpec
) -> None:
    result = fake_quantize(torch.ones(4, 6), make_spec("int8", granularity))

    assert result.is_contiguous()
    assert result.untyped_storage().nbytes() == 4 * 6 * 4


# --- codecs ---------------------------------------------------------------------------------------


def test_codecs_are_made_once_per_factory_and_parameters(make_spec: MakeSpec) -> None:
    one, other = make_spec("int4").format, make_spec("int4").format

    assert one is not other
    assert codec_of(one) is codec_of(other)
    assert codec_of(make_spec("int4n").format) is not codec_of(one)


def test_a_codec_that_does_not_resolve_is_a_plugin_error() -> None:
    with pytest.raises(PluginError, match="does not resolve"):
        codec_of(NumberFormat(name="x", bits=3, codec="bittern.numerics.codec:NoCodec"))


@pytest.mark.parametrize(
    ("codec", "largest"),
    [(IntCodec(8), 127), (IntCodec(2), 1), (FloatCodec(), 448), (FloatCodec("float8_e5m2"), 57344)],
    ids=str,
)
def test_the_scale_is_amax_by_the_largest_element(
    codec: IntCodec | FloatCodec, largest: int
) -> None:
    ranges = torch.tensor([[3.0], [0.0], [1e-45], [7e37]])

    assert codec.max_value == largest
    expected = (ranges / largest).clamp_min(2.0**-149)
    expected[1] = 1
    assert torch.equal(codec.scales(ranges).scale, expected)


def test_half_precision_ranges_give_float32_scales(make_spec: MakeSpec) -> None:
    scale = scales_from_amax(torch.tensor(1.0, dtype=torch.bfloat16), make_spec("int8")).scale

    assert scale.dtype == torch.float32
    assert scale.item() == (torch.tensor(1.0) / 127).item()
