"""Grids of small floats: every finite 16-bit number, against torch, ml_dtypes and a definition."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics import FloatCodec
from bittern.numerics.grids import E2M1, E4M3, E5M2, GRIDS, FloatGrid

by_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=str)
ML_DTYPES = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e3m2": "float6_e3m2fn",
    "e2m3": "float6_e2m3fn",
    "e2m1": "float4_e2m1fn",
}
PATTERNS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**17,), generator=generator)
    near = torch.randn(2**17, generator=generator) * 2.0 ** torch.randint(
        -18, 18, (2**17,), generator=generator
    )
    found = {
        "all of bfloat16": PATTERNS.view(torch.bfloat16).float(),
        "all of float16": PATTERNS.view(torch.float16).float(),
        "any bits": bits.to(torch.int32).view(torch.float32),
        "near the grids": near.float(),
    }
    return {name: values[values.isfinite()] for name, values in found.items()}


SAMPLES = samples()


def definition(grid: FloatGrid) -> list[float]:
    """Return the magnitudes of a grid from its definition, in the order of their codes."""
    bias = 2 ** (grid.exponent - 1) - 1
    found = []
    for exponent in range(2**grid.exponent):
        for mantissa in range(2**grid.mantissa):
            part = mantissa / 2**grid.mantissa
            power = 2.0 ** (max(exponent, 1) - bias)
            found.append((part if exponent == 0 else 1 + part) * power)
    return [value for value in found if value <= grid.max_value]


@by_grid
def test_the_codes_are_those_of_the_definition(grid: FloatGrid) -> None:
    magnitudes = definition(grid)
    values = torch.tensor([*magnitudes, *(-m for m in magnitudes[1:])])
    signs = 2 ** (grid.bits - 1)
    codes = [*range(len(magnitudes)), *(signs + code for code in range(1, len(magnitudes)))]

    assert magnitudes[-1] == grid.max_value
    assert grid.encode(values).view(torch.uint8).tolist() == codes
    stored = torch.tensor(codes, dtype=torch.uint8).view(grid.storage)
    assert torch.equal(grid.decode(stored), values)


@by_grid
@pytest.mark.parametrize("name", SAMPLES)
def test_numbers_go_to_the_nearest_and_ties_to_even_as_in_ml_dtypes(
    grid: FloatGrid, name: str
) -> None:
    np, dtypes = pytest.importorskip("numpy"), pytest.importorskip("ml_dtypes")
    theirs: Any = getattr(dtypes, ML_DTYPES[str(grid)])
    values = SAMPLES[name]
    rounded = grid.round_(values.clone())

    clipped = values.clamp(-grid.max_value, grid.max_value).numpy()
    expected = torch.from_numpy(clipped.astype(theirs).astype(np.float32))
    assert torch.equal(rounded, expected)
    assert not bool((torch.signbit(rounded) & (rounded == 0)).any())
    codes = grid.encode(rounded)
    bits = torch.from_numpy(rounded.numpy().astype(theirs).view(np.uint8))
    assert torch.equal(codes.view(torch.uint8), bits)
    assert torch.equal(grid.decode(codes), rounded)


@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_float8_is_what_torch_casts_to(grid: FloatGrid, name: str) -> None:
    values = SAMPLES[name]
    cast = values.clamp(-grid.max_value, grid.max_value).to(grid.storage)

    rounded = grid.round_(values.clone())
    assert torch.equal(rounded, cast.float())
    assert torch.equal(grid.encode(rounded).float(), cast.float())


@by_grid
def test_a_middle_goes_to_the_even_code_and_its_neighbors_to_their_side(grid: FloatGrid) -> None:
    points = definition(grid)
    for place, (below, above) in enumerate(pairwise(points)):
        middle = torch.tensor((below + above) / 2)
        assert Fraction(middle.item()) * 2 == Fraction(below) + Fraction(above)
        up, down = (torch.nextafter(middle, torch.tensor(to)) for to in (math.inf, 0.0))
        even = below if place % 2 == 0 else above
        values = torch.stack([middle, up, down, -middle])
        assert grid.round_(values).tolist() == [even, above, below, -even]


@by_grid
def test_what_lies_beyond_saturates_and_nan_stays(grid: FloatGrid) -> None:
    values = torch.tensor([1e38, -1e38, math.inf, -math.inf, math.nan, grid.max_value * 1.01])
    found = grid.round_(values)

    assert found[:4].tolist() == [grid.max_value, -grid.max_value] * 2
    assert math.isnan(found[4])
    assert found[5] == grid.max_value


@by_grid
def test_rounding_is_monotone(grid: FloatGrid) -> None:
    values = SAMPLES["near the grids"].sort().values

    assert bool((grid.round_(values).diff() >= 0).all())


@by_grid
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_rounds_to_the_same_bits(grid: FloatGrid, backend: str) -> None:
    def both(values: Tensor) -> tuple[Tensor, Tensor]:
        rounded = grid.round_(values * 1.0)
        return rounded, grid.encode(rounded)

    torch.compiler.reset()
    compiled = torch.compile(both, backend=backend, fullgraph=True)
    values = SAMPLES["near the grids"][:4096]
    for found, expected in zip(compiled(values), both(values), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_rounding_works_in_place_on_any_strides() -> None:
    values = torch.linspace(-7, 7, 48).reshape(6, 8)
    expected = E2M1.round_(values.clone())
    view = values.t()[::2]

    assert E2M1.round_(view) is view
    assert torch.equal(view, expected.t()[::2])
    assert torch.equal(values.t()[1::2], torch.linspace(-7, 7, 48).reshape(6, 8).t()[1::2])


def test_codes_in_another_dtype_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"kept in torch\.uint8, not in torch\.int8"):
        E2M1.decode(torch.zeros(2, dtype=torch.int8))


def test_torch_has_no_other_float8_grids_here() -> None:
    with pytest.raises(NumericsError, match="no float8 grid 'float8_e4m3fnuz'"):
        FloatCodec("float8_e4m3fnuz")
