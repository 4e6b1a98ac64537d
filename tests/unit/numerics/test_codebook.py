"""Codebooks: nf4 from its derivation, the nearest entry by exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bittern.builtin.formats import FORMATS
from bittern.errors import NumericsError
from bittern.numerics import CodebookCodec, codec_of, dequantize, fake_quantize, quantize
from bittern.numerics.codebook import NF4
from bittern.records import PerGroup, QuantizerSpec

SPEC = QuantizerSpec({f.name: f for f in FORMATS}["nf4"], PerGroup(64))


def test_nf4_is_the_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, section 3 and appendix E: 8 equal parts below 0, 9 with it above, scaled to 1."""
    offset = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        """Return ``count`` quantiles from ``offset`` down to, and without, one half."""
        return [quantile(offset + (0.5 - offset) * i / count) for i in range(count)]

    upper, lower = side(8), side(7)
    values = sorted([*upper, 0.0, *(-value for value in lower)])
    derived = [value / max(values) for value in values]

    assert len(NF4) == 16
    assert [round(value, 6) for value in derived] == [round(value, 6) for value in NF4]


def test_every_entry_stands_for_itself() -> None:
    codec = CodebookCodec()
    values = torch.tensor(NF4)

    assert codec.round_(values.clone()).tolist() == values.tolist()
    assert codec.store(values).tolist() == list(range(16))
    assert torch.equal(codec.load(torch.arange(16, dtype=torch.uint8)), values)


@given(value=st.floats(-1.125, 1.125, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45]))
def test_a_number_goes_to_the_nearest_entry(value: float) -> None:
    clipped = Fraction(min(max(value, -1.0), 1.0))
    found = CodebookCodec().round_(torch.tensor([value])).item()

    table = [Fraction(torch.tensor(entry).item()) for entry in NF4]
    best = min(abs(clipped - entry) for entry in table)
    assert abs(clipped - Fraction(found)) == best


TABLES = [(-1.0, 0.0, 0.25, 1.0), (-4.0, -1.0, 0.0, 1.0, 2.0), tuple(float(i) for i in range(256))]


@pytest.mark.parametrize("table", TABLES, ids=len)
def test_a_tie_goes_to_the_even_index(table: tuple[float, ...]) -> None:
    codec = CodebookCodec(table)
    for index in range(len(table) - 1):
        middle = torch.tensor([(table[index] + table[index + 1]) / 2])
        even = index if index % 2 == 0 else index + 1
        assert codec.round_(middle.clone()).item() == table[even]
        up = torch.nextafter(middle, torch.tensor(math.inf))
        down = torch.nextafter(middle, torch.tensor(-math.inf))
        assert codec.round_(up).item() == table[index + 1]
        assert codec.round_(down).item() == table[index]


def test_nan_stays_and_zero_is_never_negative() -> None:
    codec = CodebookCodec()
    found = codec.round_(torch.tensor([math.nan, -0.0, -1e-30, math.inf, -math.inf]))

    assert math.isnan(found[0])
    assert found[1:].tolist() == [0, 0, 1, -1]
    assert not bool(torch.signbit(found[1:3]).any())


def test_the_largest_of_a_group_is_kept_exactly() -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize(x, SPEC)

    assert packed.codes.dtype == torch.uint8
    top = x.unflatten(1, (2, 64)).abs().amax(-1)
    assert torch.equal(packed.scales.scale, top)
    assert torch.equal(dequantize(packed).unflatten(1, (2, 64)).abs().amax(-1), top)


def test_nf4_beats_int4_on_normal_numbers_in_groups_of_64() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    int4 = QuantizerSpec({f.name: f for f in FORMATS}["int4"], PerGroup(64))

    errors = [(fake_quantize(x, spec) - x).square().mean().item() for spec in (SPEC, int4)]
    assert errors[0] < 0.8 * errors[1]


def test_the_codec_is_made_once() -> None:
    assert codec_of(SPEC.format) is codec_of(SPEC.format)


@pytest.mark.parametrize(
    "table", [(1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0), (0.0,), (0.0, 1e-60), (0.0, math.nan)]
)
def test_a_table_that_is_no_codebook_is_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(NumericsError, match="ascending float32 numbers"):
        CodebookCodec(table)
