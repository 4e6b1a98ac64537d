"""Entropy calibration against a search written by the definition, one candidate at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bittern.calibration import estimators
from bittern.calibration.estimators import entropy_amax
from bittern.calibration.histogram import Histogram, histogram_of
from bittern.numerics import amax
from bittern.records import Granularity, PerChannel, PerTensor, QuantizerSpec

MakeData = Callable[..., Tensor]
MakeSpec = Callable[..., QuantizerSpec]

E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)]
)


def histogram(x: Tensor, granularity: Granularity, *, bins: int = 512) -> Histogram:
    return histogram_of(x, granularity, amax=amax(x, granularity), bins=bins)


def rounded(name: str, value: float, largest: float) -> float:
    """Round a magnitude onto a format's grid, in units of its step."""
    if name == "fp8":
        scaled = np.float32(value) / (np.float32(largest) / np.float32(448))
        return float(E4M3[np.abs(E4M3 - float(scaled)).argmin()])
    top = 2 ** (int(name[3:]) - 1) - 1
    scaled = np.float32(value) / (np.float32(largest) / np.float32(top))
    return float(np.clip(np.rint(scaled), 0, top))


def divergence(counts: list[int], end: int, name: str, width: float) -> float:
    """Kullback-Leibler divergence of the candidate that keeps the first ``end`` bins."""
    cells: dict[float, list[int]] = {}
    for i in range(end):
        if counts[i]:
            cells.setdefault(rounded(name, (i + 0.5) * width, end * width), []).append(i)
    quantized = [0.0] * end
    for members in cells.values():
        mean = sum(counts[i] for i in members) / len(members)
        for i in members:
            quantized[i] = mean
    reference = [float(count) for count in counts[:end]]
    reference[-1] += sum(counts[end:])
    total, other = sum(reference), sum(quantized)
    if other == 0:
        return math.inf
    found = 0.0
    for p, q in zip(reference, quantized, strict=True):
        if p and not q:
            return math.inf
        if p:
            found += p / total * math.log(p / total * other / q)
    return found


def searched(known: Histogram, row: int, name: str) -> tuple[list[float], list[float]]:
    """Return the range of every candidate, and its divergence."""
    counts = known.counts[row, 1:].tolist()
    width = float(known.width[row])
    last = max((i + 1 for i, count in enumerate(counts) if count), default=0)
    if last == 0:
        return [0.0], [0.0]
    filled = [i + 1 for i, count in enumerate(counts) if count]
    first = filled[min(len(filled), 2 ** ({"int8": 8, "int4": 4, "fp8": 8}[name] - 1)) - 1]
    ends = range(last, first - 1, -1)
    return [end * width for end in ends], [divergence(counts, e, name, width) for e in ends]


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1)], ids=str)
def test_it_finds_what_a_search_of_all_candidates_finds(
    name: str, granularity: Granularity, data: str, make_data: MakeData, make_spec: MakeSpec
) -> None:
    x = make_data(data, 3000, 2) * torch.tensor([1.0, 5.0])
    known = histogram(x, granularity, bins={"int8": 256, "int4": 64, "fp8": 256}[name])
    found = entropy_amax(known, make_spec(name, granularity))
    assert found.shape == known.amax.shape
    for row, value in enumerate(found.flatten().tolist()):
        candidates, costs = searched(known, row, name)
        best = candidates[costs.index(min(costs))]
        assert value == pytest.approx(min(best, float(known.amax.flatten()[row])), rel=0.05)


def test_a_far_outlier_is_cut_off_and_a_full_range_is_kept(
    make_data: MakeData, make_spec: MakeSpec
) -> None:
    spec = make_spec("int4")
    outlier, uniform = make_data("outlier", 20000), make_data("uniform", 20000)
    assert entropy_amax(histogram(outlier, PerTensor()), spec) < 10  # of 40
    assert entropy_amax(histogram(uniform, PerTensor()), spec) > 0.95


@pytest.mark.parametrize("at_once", [1, 2**21])
def test_ranges_that_lose_nothing_leave_the_largest(
    at_once: int, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimators, "_AT_ONCE", at_once)
    x = torch.tensor([0.25, 0.25, 1.0, 1.0])  # cut to 0.25, one value is left: no divergence either
    assert entropy_amax(histogram(x, PerTensor(), bins=16), make_spec("int2")) == 1


def test_zeros_say_nothing_about_the_range(make_data: MakeData, make_spec: MakeSpec) -> None:
    x = make_data("laplace", 5000)
    padded = torch.cat([x, torch.zeros(100_000)])
    found = [entropy_amax(histogram(t, PerTensor()), make_spec("int8")) for t in (x, padded)]
    assert torch.equal(*found)


def test_the_range_is_never_cut_into_fewer_bins_than_the_format_has_values(
    make_data: MakeData, make_spec: MakeSpec
) -> None:
    x = make_data("laplace", 5000)
    x[0] = 1000.0  # the others lie in a few bins: what rounding does to them cannot be seen
    known = histogram(x, PerTensor())
    assert entropy_amax(known, make_spec("int8")) >= 128 * known.width


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_few_data_do_not_make_a_range_of_next_to_nothing(
    name: str, make_data: MakeData, make_spec: MakeSpec
) -> None:
    x = make_data("laplace", 240)  # in 8192 bins: the first ones hold one number or none
    found = entropy_amax(histogram(x, PerTensor(), bins=8192), make_spec(name))
    assert found > x.abs().median()


@pytest.mark.parametrize("bins", [2048, 4096])
def test_many_bins_are_searched_in_larger_steps(
    bins: int, make_data: MakeData, make_spec: MakeSpec
) -> None:
    x = make_data("laplace", 20000)
    fine = entropy_amax(histogram(x, PerTensor(), bins=bins), make_spec("int4"))
    coarse = entropy_amax(histogram(x, PerTensor(), bins=512), make_spec("int4"))
    assert float(fine) == pytest.approx(float(coarse), rel=0.25)
    assert fine < 0.9 * x.abs().max()


def test_candidates_compared_in_pieces_give_the_same(
    make_data: MakeData, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = histogram(make_data("laplace", 3000, 3), PerChannel(-1))
    whole = entropy_amax(known, make_spec("int8"))
    monkeypatch.setattr(estimators, "_AT_ONCE", 512 * 3 * 7)
    assert torch.equal(entropy_amax(known, make_spec("int8")), whole)
