"""Large tensors on the CPU: the bits that come from chunks are those of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics import (
    Quantized,
    Scales,
    chunked,
    codec_of,
    dequantize,
    fake_quantize,
    measure,
    quantize,
    scales_for,
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
from bittern.testing.values import layouts
from bittern.toolkit import Toolkit

TABLE = Toolkit(block=["*"]).registry.formats
FORMATS = [TABLE.get(name) for name in TABLE]
ASYMMETRIC = NumberFormat(
    name="int4-affine",
    bits=4,
    codec="bittern.numerics.integers:IntCodec",
    params={"bits": 4, "asymmetric": True},
)
FINE = (PerGroup(16), PerGroup(5), PerGroup(8, axis=0), PerBlock(4, 8))
COARSE = (PerTensor(), PerChannel(0), PerChannel(1), PerChannel((0, 1)), PerToken())
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)

T = TypeVar("T")
SameBits = Callable[[Tensor, Tensor], bool]


def specs() -> Iterator[QuantizerSpec]:
    for number_format in (*FORMATS, ASYMMETRIC):
        for granularity in FINE if number_format.block_only else FINE + COARSE:
            yield QuantizerSpec(number_format, granularity)


def in_chunks_of(size: int, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", size)
        return function(*arguments, **options)


def numbers(shape: tuple[int, ...], spec: QuantizerSpec, *, seed: int = 0) -> Tensor:
    """Return numbers of many magnitudes, blocks of zeros among them, as the format can hold."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 4, shape, generator=generator).float()
    x = torch.randn(shape, generator=generator) * torch.exp2(exponents)
    x.flatten()[: x.numel() // 5] = 0.0
    return x if codec_of(spec.format).signed else x.abs()


def static(x: Tensor, spec: QuantizerSpec) -> Scales:
    return scales_for(measure(x, spec), spec)


def assert_same(
    x: Tensor, spec: QuantizerSpec, scales: Scales | None, *, size: int, same_bits: SameBits
) -> None:
    before = x.clone()
    whole = fake_quantize(x, spec, scales)
    parts = in_chunks_of(size, fake_quantize, x, spec, scales)
    nan = whole.isnan()
    assert torch.equal(parts.isnan(), nan)
    assert same_bits(parts.masked_fill(nan, 0), whole.masked_fill(nan, 0))
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    if not bool(x.isfinite().all()):
        return
    codes = quantize(x, spec, scales)
    assert_same_codes(in_chunks_of(size, quantize, x, spec, scales), codes, same_bits)
    assert same_bits(in_chunks_of(size, dequantize, codes), dequantize(codes))


def assert_same_codes(found: Quantized, wanted: Quantized, same_bits: SameBits) -> None:
    assert found.codes.is_contiguous()
    assert same_bits(found.codes, wanted.codes)
    assert same_bits(found.scales.scale, wanted.scales.scale)
    for name in ("zero_point", "global_scale"):
        mine, theirs = getattr(found.scales, name), getattr(wanted.scales, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or same_bits(mine, theirs)


@pytest.mark.parametrize("spec", list(specs()), ids=str)
def test_chunks_give_the_bits_of_the_whole(spec: QuantizerSpec, same_bits: SameBits) -> None:
    sizes, shapes = (1, 20, 60, 150), ((7, 11), (3, 5, 24), (33, 16), (2, 3, 4, 10))
    for dtype, shape, size in zip(DTYPES, shapes, sizes, strict=True):
        x = numbers(shape, spec).to(dtype)
        for scales in (None, static(x, spec)):
            assert_same(x, spec, scales, size=size, same_bits=same_bits)


@pytest.mark.parametrize("name", ["int8", "fp8"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_values_and_chunk_size(
    name: str, same_bits: SameBits, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=5)))
    granularity: Granularity = data.draw(st.sampled_from(FINE + COARSE))
    spec = QuantizerSpec(TABLE.get(name), granularity)
    x = numbers(shape, spec, seed=data.draw(st.integers(0, 2**31)))
    for value in data.draw(st.lists(st.floats(width=32), max_size=3)):
        x.flatten()[data.draw(st.integers(0, x.numel() - 1))] = value
    scales = data.draw(st.sampled_from([None, static(x.nan_to_num(1.0, 1.0, 1.0), spec)]))
    size = data.draw(st.integers(1, x.numel()))
    assert_same(x, spec, scales, size=size, same_bits=same_bits)


@pytest.mark.parametrize("granularity", FINE + COARSE, ids=str)
def test_memory_layouts(granularity: Granularity, same_bits: SameBits) -> None:
    spec = QuantizerSpec(TABLE.get("int8"), granularity)
    for _, x in layouts(torch.bfloat16):
        for scales in (None, static(x, spec)):
            assert_same(x, spec, scales, size=500, same_bits=same_bits)


def test_a_dense_layout_is_kept() -> None:
    x = torch.randn(4, 8, 5, 7).to(memory_format=torch.channels_last)
    spec = QuantizerSpec(TABLE.get("int8"), PerTensor())
    assert in_chunks_of(64, fake_quantize, x, spec).stride() == x.stride()


@pytest.mark.parametrize("size", [1, 100])
def test_stacked_tensors_keep_their_own_global_scale(size: int, same_bits: SameBits) -> None:
    two_level = [f for f in FORMATS if codec_of(f).two_level]
    for number_format, stacked in product(two_level, (False, True)):
        spec = replace(QuantizerSpec(number_format, PerGroup(16)), stacked=stacked)
        x = numbers((3, 5, 32), spec) * torch.tensor([1.0, 100.0, 1e-3]).view(3, 1, 1)
        assert_same(x, spec, None, size=size, same_bits=same_bits)
        assert_same(x, spec, static(x, spec), size=size, same_bits=same_bits)
        upper = static(x * 3, spec).global_scale
        parts = in_chunks_of(size, fake_quantize, x, spec, global_scale=upper)
        assert same_bits(parts, fake_quantize(x, spec, global_scale=upper))


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_hold_whole_regions_and_cover_the_tensor_once(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(chunked, "CHUNK", 50)
    x = torch.zeros(6, 10, 33)
    seen: list[tuple[int, ...]] = []

    def count(
        part: Tensor, spec: QuantizerSpec, scales: Scales | None, upper: Tensor | None
    ) -> tuple[Tensor, Scales]:
        seen.append(tuple(part.shape))
        part += 1  # a view of x
        found = measure(part, spec).amax
        return part, Scales(found)

    spec = QuantizerSpec(TABLE.get("int8"), PerBlock(4, 8))
    result, scales = chunked.in_chunks(count, x, spec, None, global_scale=None, dtype=torch.float32)
    assert torch.equal(x, torch.ones_like(x))
    assert torch.equal(result, x)
    assert torch.equal(scales.scale, torch.ones(6, 3, 5))
    assert all(rows in (2, 4, 8, 10) and columns in (1, 8, 32, 33) for _, rows, columns in seen)
    assert all(a * b * c <= 50 * threads for a, b, c in seen)


def test_a_small_tensor_and_what_is_watched_stay_whole() -> None:
    large = torch.ones(chunked.CHUNK + 1)
    scales = Scales(torch.tensor(0.1))
    assert chunked.worth_chunks(large, scales, None)
    assert chunked.worth_chunks(torch.nn.Parameter(large, requires_grad=False), None, None)
    assert not chunked.worth_chunks(large[1:], scales, None)
    assert not chunked.worth_chunks(large.to("meta"), scales, None)
    watched = large.clone().requires_grad_()
    learned = Scales(torch.tensor(0.1, requires_grad=True))
    assert not chunked.worth_chunks(watched, scales, None)
    assert not chunked.worth_chunks(large, learned, None)
    assert not chunked.worth_chunks(large.as_subclass(type("Kind", (Tensor,), {})), scales, None)
    with torch.no_grad():
        assert chunked.worth_chunks(watched, learned, None)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_compile_see_the_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 8)
    x = torch.randn(3, 4, 16)
    spec, scales = QuantizerSpec(TABLE.get("fp8"), PerTensor()), Scales(torch.tensor(0.02))
    wanted = fake_quantize(x, spec, scales)
    assert torch.equal(torch.vmap(lambda row: fake_quantize(row, spec, scales))(x), wanted)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda v: fake_quantize(v, spec, scales), backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), wanted)
    assert len(graphs) == 1
    divisions = [node for node in graphs[0].graph.nodes if "truediv" in str(node.target)]
    assert len(divisions) == 1  # one for all chunks would be many


def test_a_bad_number_is_refused_wherever_it_is() -> None:
    spec = QuantizerSpec(TABLE.get("int8"), PerToken())
    for place, value in product((0, 500, 1023), (float("nan"), float("inf"), -float("inf"))):
        x = torch.ones(64, 16)
        x.view(-1)[place] = value
        with pytest.raises(NumericsError, match="NaN or Inf"):
            in_chunks_of(64, quantize, x, spec)


def test_scales_of_another_shape_are_refused() -> None:
    spec, scales = QuantizerSpec(TABLE.get("int8"), PerToken()), Scales(torch.ones(32, 1))
    for run in (fake_quantize, quantize):
        with pytest.raises(NumericsError, match="do not fit"):
            in_chunks_of(8, run, torch.ones(64, 16), spec, scales)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("int8", PerChannel(0)), ("fp8", PerToken()), ("int4", PerGroup(128))],
)
def test_the_real_chunk_size(name: str, granularity: Granularity, same_bits: SameBits) -> None:
    spec = QuantizerSpec(TABLE.get(name), granularity)
    x = numbers((600, 1000), spec).bfloat16()
    for scales in (None, static(x, spec)):
        whole = in_chunks_of(x.numel(), fake_quantize, x, spec, scales)
        assert same_bits(fake_quantize(x, spec, scales), whole)
