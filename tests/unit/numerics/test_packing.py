"""Packed codes: every layout against plain loops over bits, and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics import gguf
from bittern.numerics.packing import (
    from_offset_binary,
    offset_binary,
    pack_awq,
    pack_bits,
    pack_gptq,
    pack_nibbles,
    unpack_awq,
    unpack_bits,
    unpack_gptq,
    unpack_nibbles,
)

EXAMPLES = settings.default.max_examples // 4


@st.composite
def matrices(draw: st.DrawFn, low: int, high: int, *, dtype: torch.dtype = torch.int8) -> Tensor:
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(low, high + 1, (rows, columns), generator=generator).to(dtype)


def as_word(value: int) -> int:
    """Return 32 bits as a signed integer."""
    return value - 2**32 if value >= 2**31 else value


# --- nibbles --------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES)
@given(codes=matrices(0, 15, dtype=torch.uint8))
def test_the_even_element_is_the_low_nibble(codes: Tensor) -> None:
    packed = pack_nibbles(codes)

    rows, columns = codes.shape
    assert packed.shape == (rows, (columns + 1) // 2)
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        padded = [*row, 0]
        assert found == [padded[i] + 16 * padded[i + 1] for i in range(0, columns, 2)]
    assert torch.equal(unpack_nibbles(packed, columns), codes)


@settings(max_examples=EXAMPLES)
@given(codes=matrices(-8, 7))
def test_modelopt_packs_signed_nibbles_of_even_and_odd_rows(codes: Tensor) -> None:
    packed = pack_nibbles(codes, axis=-2)

    rows, columns = codes.shape
    assert packed.shape == ((rows + 1) // 2, columns)
    for (row, column), byte in [(i, int(packed[i])) for i in map(tuple, packed.nonzero().tolist())]:
        odd = int(codes[2 * row + 1, column]) if 2 * row + 1 < rows else 0
        assert byte == int(codes[2 * row, column]) % 16 + 16 * (odd % 16)
    assert torch.equal(unpack_nibbles(packed, rows, axis=-2, signed=True), codes)


# --- words ----------------------------------------------------------------------------------------


@settings(max_examples=4 * EXAMPLES)
@given(data=st.data(), bits=st.integers(2, 8))
def test_a_row_is_one_bit_string_from_the_lowest_bit(data: st.DataObject, bits: int) -> None:
    codes = data.draw(matrices(0, 2**bits - 1, dtype=torch.uint8))
    packed = pack_bits(codes, bits)

    rows, columns = codes.shape
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-columns * bits // 32))
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        string = sum(code << (i * bits) for i, code in enumerate(row))
        words = [as_word(string >> (32 * i) & 0xFFFFFFFF) for i in range(len(found))]
        assert found == words
    assert torch.equal(unpack_bits(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_axis_of_any_rank_can_be_packed(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, 45, 2), generator=generator).to(torch.uint8)
    packed = pack_bits(codes, bits, axis=1)

    assert torch.equal(packed[1, :, 0], pack_bits(codes[1, :, 0], bits))
    assert torch.equal(unpack_bits(packed, bits, 45, axis=1), codes)


@settings(max_examples=EXAMPLES)
@given(data=st.data(), bits=st.integers(2, 8))
def test_offset_binary_and_back(data: st.DataObject, bits: int) -> None:
    half = 2 ** (bits - 1)
    codes = data.draw(matrices(-half, half - 1))
    moved = offset_binary(codes, bits)

    assert moved.tolist() == [[c + half for c in row] for row in codes.tolist()]
    assert torch.equal(from_offset_binary(moved, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_word_of_gptq_holds_neighbors_of_one_column_of_the_weight(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (5, 64), generator=generator).to(torch.uint8)
    packed = pack_gptq(codes, bits)

    assert packed.shape == (64 * bits // 32, 5)
    for output in range(5):
        string = sum(int(code) << (i * bits) for i, code in enumerate(codes[output]))
        words = [as_word(string >> (32 * i) & 0xFFFFFFFF) for i in range(64 * bits // 32)]
        assert packed[:, output].tolist() == words
    assert torch.equal(unpack_gptq(packed, bits, 64), codes)


def test_a_word_of_awq_holds_eight_columns_in_the_order_of_its_kernels() -> None:
    columns = torch.arange(16, dtype=torch.uint8).view(1, 16)
    first, second = (word & 0xFFFFFFFF for word in pack_awq(columns)[0].tolist())

    assert [first >> (4 * j) & 15 for j in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]
    assert [second >> (4 * j) & 15 for j in range(8)] == [8, 10, 12, 14, 9, 11, 13, 15]


@settings(max_examples=EXAMPLES)
@given(rows=st.integers(1, 4), words=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_awq_and_back(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 8 * words), generator=generator).to(torch.uint8)

    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


# --- GGUF -----------------------------------------------------------------------------------------


def test_blocks_of_gguf_have_their_scale_in_front_and_halves_as_nibbles() -> None:
    scale = torch.tensor([[0.5]])
    codes = torch.arange(32).remainder(16).view(1, 32)

    half = [0x00, 0x38]  # float16 0.5, little-endian
    assert gguf.pack_q8_0(codes - 8, scale)[0].tolist()[:4] == [*half, 248, 249]
    q4 = gguf.pack_q4_0(codes - 8, scale)[0].tolist()
    assert q4 == [*half, *[k + 16 * k for k in range(16)]]
    shifted = codes.clone()
    shifted[0, 16:] = 3
    mx = gguf.pack_mxfp4(shifted, torch.tensor([[130]]))[0].tolist()
    assert mx == [130, *[k + 16 * 3 for k in range(16)]]


Pack = Callable[[Tensor, Tensor], Tensor]
Unpack = Callable[[Tensor], tuple[Tensor, Tensor]]


@pytest.mark.parametrize(
    ("pack", "unpack", "low", "high", "size"),
    [
        (gguf.pack_q8_0, gguf.unpack_q8_0, -128, 127, 34),
        (gguf.pack_q4_0, gguf.unpack_q4_0, -8, 7, 18),
        (gguf.pack_mxfp4, gguf.unpack_mxfp4, 0, 15, 17),
    ],
)
def test_gguf_and_back(pack: Pack, unpack: Unpack, low: int, high: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high + 1, (3, 2, 96), generator=generator)
    scales = torch.randint(1, 200, (3, 2, 3), generator=generator)
    scales = scales.to(torch.uint8) if pack is gguf.pack_mxfp4 else scales.half() / 64
    packed = pack(codes, scales)
    found, theirs = unpack(packed)

    assert packed.shape == (3, 2, 3 * size)
    assert torch.equal(found.long(), codes)
    assert torch.equal(theirs, scales)


# --- what is refused ------------------------------------------------------------------------------

NEGATIVE, LARGE = torch.tensor([[-1, 2]]), torch.tensor([[3, 16]])
ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_nibbles(LARGE),
        lambda: pack_nibbles(torch.tensor([16], dtype=torch.uint8)),
        lambda: pack_nibbles(torch.tensor([-9], dtype=torch.int8)),
        lambda: pack_bits(NEGATIVE, 4),
        lambda: pack_bits(LARGE, 4),
        lambda: pack_gptq(LARGE, 4),
        lambda: pack_awq(LARGE.repeat(1, 4)),
        lambda: offset_binary(torch.tensor([8]), 4),
        lambda: offset_binary(torch.tensor([-5]), 3),
        lambda: gguf.pack_q8_0(torch.full((1, 32), 128), ONE),
        lambda: gguf.pack_q4_0(torch.full((1, 32), 8), ONE),
        lambda: gguf.pack_mxfp4(torch.full((1, 32), -1), ONE.to(torch.uint8)),
    ],
)
def test_codes_that_would_spill_into_their_neighbors_are_refused(
    call: Callable[[], object],
) -> None:
    with pytest.raises(NumericsError, match=r"codes from -?\d+ to -?\d+ do not fit into"):
        call()


def test_numbers_that_are_no_codes_are_refused() -> None:
    for values in (torch.ones(2), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(NumericsError, match="cannot pack a tensor of dtype"):
            pack_bits(values, 4)


def test_lengths_and_shapes_that_do_not_fit_are_refused() -> None:
    packed = pack_bits(torch.ones(2, 9, dtype=torch.int32), 4)
    with pytest.raises(NumericsError, match="17 codes are packed into 3, not 2"):
        unpack_bits(packed, 4, 17)
    with pytest.raises(NumericsError, match="5 codes are packed into 3, not 2"):
        unpack_nibbles(torch.zeros(2, dtype=torch.uint8), 5)
    with pytest.raises(NumericsError, match="multiples of 8 columns"):
        pack_awq(torch.ones(2, 9, dtype=torch.int32))
    with pytest.raises(NumericsError, match="no blocks of 32"):
        gguf.pack_q8_0(torch.zeros(1, 33, dtype=torch.int8), ONE)
    with pytest.raises(NumericsError, match="no blocks of 34"):
        gguf.unpack_q8_0(torch.zeros(35, dtype=torch.uint8))
    with pytest.raises(NumericsError, match="no float16 number"):
        gguf.pack_q8_0(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[0.1]]))
