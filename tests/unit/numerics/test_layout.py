"""Granularity as layout: blocks and back, scale shapes, stored bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bittern.numerics import amax, scale_shape
from bittern.numerics.layout import as_blocks, expand_scale, from_blocks
from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

SHAPES = {
    PerTensor(): (),
    PerChannel(0): (2, 1, 1),
    PerChannel(1): (1, 5, 1),
    PerChannel(-1): (1, 1, 7),
    PerToken(): (2, 5, 1),
    PerGroup(3): (2, 5, 3),
    PerGroup(7): (2, 5, 1),
    PerGroup(64): (2, 5, 1),
    PerBlock(2, 4): (2, 3, 2),
    PerBlock(5, 7): (2, 1, 1),
}


@pytest.mark.parametrize(("granularity", "expected"), SHAPES.items(), ids=str)
def test_scale_shapes_are_those_of_the_documentation(
    granularity: Granularity, expected: tuple[int, ...]
) -> None:
    x = torch.randn(2, 5, 7)

    assert scale_shape(x.shape, granularity) == expected
    assert amax(x, granularity).shape == expected


@pytest.mark.parametrize(("granularity", "expected"), SHAPES.items(), ids=str)
def test_bits_per_element_count_one_scale_per_entry_of_amax(
    granularity: Granularity,
    expected: tuple[int, ...],
    make_spec: Callable[..., QuantizerSpec],
) -> None:
    spec = make_spec("int4", granularity)
    scales = torch.Size(expected).numel()

    assert spec.bits_per_element((2, 5, 7)) == pytest.approx(4 + 32 * scales / 70)


@pytest.mark.parametrize("granularity", [PerGroup(10**12), PerBlock(10**12, 10**12)], ids=str)
def test_a_group_beyond_the_tensor_needs_no_memory_for_padding(granularity: Granularity) -> None:
    x = torch.randn(2, 5, 7)
    blocks = as_blocks(x, granularity)

    assert blocks.numel() == x.numel()
    assert torch.equal(from_blocks(blocks, granularity, x.shape), x)
    assert as_blocks(torch.zeros(2, 0, 0), granularity).numel() == 0


def test_an_empty_tensor_has_the_bits_of_its_codes(
    make_spec: Callable[..., QuantizerSpec],
) -> None:
    assert make_spec("int4", PerGroup(3)).bits_per_element((0, 5)) == 4


@given(
    shape=st.lists(st.integers(0, 6), min_size=2, max_size=4).map(tuple),
    granularity=st.one_of(
        st.builds(PerGroup, st.integers(1, 8)),
        st.builds(PerBlock, st.integers(1, 8), st.integers(1, 8)),
        st.sampled_from([PerTensor(), PerToken(), PerChannel(0), PerChannel(-1)]),
    ),
)
def test_from_blocks_undoes_as_blocks(shape: tuple[int, ...], granularity: Granularity) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)

    assert torch.equal(from_blocks(as_blocks(x, granularity), granularity, x.shape), x)


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    granularity=st.one_of(
        st.builds(PerGroup, st.integers(1, 8)),
        st.builds(PerBlock, st.integers(1, 8), st.integers(1, 8)),
        st.sampled_from([PerTensor(), PerToken(), PerChannel(0), PerChannel(-1)]),
    ),
)
def test_scales_broadcast_against_blocks(shape: tuple[int, ...], granularity: Granularity) -> None:
    x = torch.randn(shape)
    blocks = as_blocks(x, granularity)

    assert (blocks / expand_scale(amax(x, granularity), granularity)).shape == blocks.shape


@pytest.mark.parametrize(
    ("granularity", "text"),
    [
        (PerTensor(), "tensor"),
        (PerChannel(0), "channel"),
        (PerChannel(-1), "channel[-1]"),
        (PerToken(), "token"),
        (PerGroup(128), "group[128]"),
        (PerBlock(128, 64), "block[128x64]"),
    ],
)
def test_granularities_name_themselves(granularity: Granularity, text: str) -> None:
    assert str(granularity) == text
