"""Compact storage: the bytes a format promises, and every bit of what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bittern.builtin.formats import FORMATS
from bittern.errors import NumericsError
from bittern.numerics import Quantized, Scales, dequantize, quantize
from bittern.numerics.compact import compact, compact_layout, decode, expand
from bittern.records import NumberFormat, PerChannel, PerGroup, PerTensor, QuantizerSpec

SameBits = Callable[[Tensor, Tensor], bool]
BY_NAME = {f.name: f for f in FORMATS}
SHAPES = [(6, 64), (5, 7), (2, 3, 3, 3), (4, 1), (13,)]


def values(number_format: NumberFormat, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[0] = 0.0
    return x.abs() if number_format.name.startswith("uint") else x


def as_spec(number_format: NumberFormat, *, stacked: bool = False) -> QuantizerSpec:
    return QuantizerSpec(number_format, number_format.weight_granularity, stacked=stacked)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
def test_every_format_comes_back_bit_for_bit(
    number_format: NumberFormat, shape: tuple[int, ...], same_bits: SameBits
) -> None:
    whole = quantize(values(number_format, shape), as_spec(number_format))

    parts = compact(whole)
    back = expand(parts, shape, whole.spec, whole.dtype)

    assert same_bits(back.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert same_bits(back.scales.step, whole.scales.step)
    assert same_bits(dequantize(back), dequantize(whole))
    for dtype in (torch.float32, torch.bfloat16):
        expected = dequantize(expand(parts, shape, whole.spec, dtype))
        assert same_bits(decode(parts, shape, whole.spec, dtype), expected)
    layout = compact_layout(shape, whole.spec)
    assert {name: (tuple(p.shape), p.dtype) for name, p in parts.items()} == layout


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
def test_it_takes_the_bytes_that_the_plan_promises(number_format: NumberFormat) -> None:
    shape, spec = (64, 512), as_spec(number_format)
    parts = compact(quantize(values(number_format, shape), spec))
    promised = math.ceil(spec.bits_per_element(shape) * math.prod(shape) / 8)
    assert sum(part.nbytes for part in parts.values()) == promised


def test_stacked_tensors_keep_a_global_scale_each(same_bits: SameBits) -> None:
    spec = QuantizerSpec(BY_NAME["nvfp4"], PerGroup(16), stacked=True)
    x = torch.randn(3, 4, 32) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    whole = quantize(x, spec)
    parts = compact(whole)
    assert parts["global_scale"].shape == (3, 1, 1)
    assert same_bits(dequantize(expand(parts, (3, 4, 32), spec, x.dtype)), dequantize(whole))
    assert compact_layout((3, 4, 32), spec)["global_scale"] == ((3, 1, 1), torch.float32)


def test_codes_and_scales_that_the_format_does_not_store_are_refused() -> None:
    int4, mx = QuantizerSpec(BY_NAME["int4"], PerChannel(0)), as_spec(BY_NAME["mxfp8"])
    nine = torch.full((2, 4), 9, dtype=torch.int8)
    wrong = Quantized(nine, Scales(torch.ones(2, 1)), int4, torch.float32)
    with pytest.raises(NumericsError, match="do not fit"):
        compact(wrong)
    zero = torch.zeros(2, 32).to(torch.float8_e4m3fn)
    wrong = Quantized(zero, Scales(torch.full((2, 1), 3.0)), mx, torch.float32)
    with pytest.raises(NumericsError, match="e8m0"):
        compact(wrong)


def test_a_tensor_without_dimensions_is_stored_unpacked(same_bits: SameBits) -> None:
    spec = QuantizerSpec(BY_NAME["int4"], PerTensor())
    whole = quantize(torch.tensor(0.7), spec)
    parts = compact(whole)
    assert same_bits(dequantize(expand(parts, (), spec, whole.dtype)), dequantize(whole))
    assert same_bits(decode(parts, (), spec, whole.dtype), dequantize(whole))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_codebook_with_fewer_numbers_than_its_bits_could_count(
    bits: int, same_bits: SameBits
) -> None:
    number_format = NumberFormat(
        name="five",
        bits=bits,
        codec="bittern.numerics.codebook:CodebookCodec",
        params={"table": (-1.0, -0.3, 0.0, 0.4, 1.0)},
    )
    spec = QuantizerSpec(number_format, PerChannel(0))
    whole = quantize(torch.randn(4, 9), spec)
    assert same_bits(decode(compact(whole), (4, 9), spec, whole.dtype), dequantize(whole))


def test_a_large_tensor_is_decoded_alike(same_bits: SameBits) -> None:
    x = torch.randn(300, 2048)
    for name in ("nvfp4", "fp8", "int4-asym", "nf4", "mxfp6"):
        whole = quantize(x, as_spec(BY_NAME[name]))
        found = decode(compact(whole), tuple(x.shape), whole.spec, x.dtype)
        assert same_bits(found, dequantize(whole))
