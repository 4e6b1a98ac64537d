"""Histograms: exact counts that neither order, size of batches nor growth changes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bittern.calibration.histogram import Histogram, HistogramObserver, histogram_of
from bittern.errors import CalibrationError
from bittern.nn.observer import SharedInputs
from bittern.numerics import amax
from bittern.records import Granularity, PerChannel, PerGroup, PerTensor
from bittern.toolkit import Toolkit

GRANULARITIES = [PerTensor(), PerChannel(-1), PerChannel((0, 2))]


def observed(
    tensors: list[Tensor], granularity: Granularity = GRANULARITIES[0], *, bins: int = 2048
) -> Histogram:
    observer = HistogramObserver(granularity, SharedInputs(), bins=bins)
    for x in tensors:
        observer.observe(x)
    found = observer.result()
    assert found is not None
    return found


def assert_same(one: Histogram, other: Histogram) -> None:
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.amax, other.amax)


def counted(rows: np.ndarray, bins: int) -> list[list[int]]:
    """Count by the definition: bin i holds (i - 1) w < |x| <= i w."""
    found = []
    for row in np.abs(rows.astype(np.float64)):
        width = 2.0**-149
        while row.max() > bins * width:
            width *= 2
        counts = [0] * (bins + 1)
        for value in row:
            counts[math.ceil(value / width)] += 1
        found.append(counts)
    return found


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bins_hold_what_their_definition_says(granularity: Granularity, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, 3, generator=generator).to(dtype)
    x[0, :7] = 0
    x[1, 0] = 4  # a power of two is the upper edge of the last bin
    x = x.transpose(0, 1) if granularity == PerTensor() else x  # not contiguous
    found = histogram_of(x, granularity, amax=amax(x, granularity), bins=64)

    rows = {
        "tensor": x.reshape(1, -1),
        "channel[-1]": x.reshape(-1, 3).T,
        "channel[0,2]": x.transpose(1, 2).reshape(15, -1),
    }[str(granularity)]
    assert found.counts.tolist() == counted(rows.float().numpy(), 64)
    assert torch.equal(found.amax, amax(x, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_growing_keeps_every_count(granularity: Granularity) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(4, 30, 2, generator=generator) * scale for scale in (1e-3, 1, 7e4, 0.5, 3e9)
    ]
    found = observed(tensors, granularity)

    assert int(found.counts.sum()) == 5 * 4 * 30 * 2
    whole = torch.cat(tensors, 1)
    assert_same(found, histogram_of(whole, granularity, amax=amax(whole, granularity)))


@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=str)
def test_the_order_of_batches_does_not_matter(granularity: Granularity) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(6, 3, generator=generator) * 2.0**i for i in range(-9, 9, 3)]
    tensors += [torch.zeros(6, 3)]
    first = observed(tensors, granularity)
    for seed in range(5):
        order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed))
        assert_same(first, observed([tensors[i] for i in order], granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=str)
def test_one_batch_of_eight_equals_eight_of_one(granularity: Granularity) -> None:
    x = torch.randn(8, 20, 5, generator=torch.Generator().manual_seed(3))
    assert_same(observed([x], granularity), observed(list(x.split(1)), granularity))


def test_a_first_batch_of_zeros_does_no_harm() -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(4)) + 1
    found = observed([torch.zeros(30), x])
    without = observed([x])

    assert found.counts[0, 0] == 30
    assert torch.equal(found.counts[:, 1:], without.counts[:, 1:])
    assert without.counts[0, 0] == 0


def test_zeros_alone_have_the_range_zero() -> None:
    found = observed([torch.zeros(4, 3), torch.zeros(2, 3)], PerChannel(-1))
    assert found.counts[:, 0].tolist() == [6, 6, 6]
    assert not found.amax.any()


def test_empty_tensors_count_for_nothing() -> None:
    observer = HistogramObserver(PerTensor(), SharedInputs())
    observer.observe(torch.empty(0, 4))
    assert observer.result() is None
    assert observer.first_bad_batch() is None

    observer.observe(torch.ones(3))
    observer.observe(torch.empty(0, 4))
    found = observer.result()
    assert found is not None
    assert int(found.counts.sum()) == 3


def test_counts_beyond_the_integers_of_float32_are_exact() -> None:
    size = 2**24 + 3
    x = torch.ones(1).expand(size)
    found = observed([x, x, torch.ones(1)])
    assert found.counts.max() == 2 * size + 1


@pytest.mark.parametrize("large", [3e38, 1.0, 1e-30])
@pytest.mark.parametrize("small", [1e-38, 1e-45, 0.0])
def test_magnitudes_of_all_sizes_are_counted(large: float, small: float) -> None:
    found = observed([torch.full((5,), small), torch.tensor([large, -large])])
    assert int(found.counts.sum()) == 7
    assert found.amax == torch.tensor(large)
    assert int(found.counts[0, 1025:].sum()) == 2 or large < 1e-29  # in the upper half


def test_the_width_is_the_narrowest_that_reaches_the_maximum() -> None:
    for largest in (1.0, 1.0001, 1.9999, 2.0, 5.0):
        found = observed([torch.tensor([largest])], bins=16)
        width = float(found.width)
        assert 16 * width >= largest > 8 * width
        assert math.frexp(width)[0] == 0.5
        assert found.edges.shape == (1, 17)
        assert found.centers[0, 0] == width / 2


def test_tensors_made_under_inference_mode_can_be_observed() -> None:
    observer = HistogramObserver(PerTensor(), SharedInputs())
    with torch.inference_mode():
        observer.observe(torch.ones(3))
    observer.observe(torch.ones(2) * 9)
    found = observer.result()
    assert found is not None
    assert int(found.counts.sum()) == 5


# --- bins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "bins"), [(1, 2048), (512, 2048), (513, 1024), (4096, 256), (20000, 128)]
)
def test_memory_is_bounded_by_fewer_bins_per_channel(channels: int, bins: int) -> None:
    x = torch.ones(1, channels)
    assert histogram_of(x, PerChannel(-1), amax=x).counts.shape == (channels, bins + 1)


@pytest.mark.parametrize("bins", [0, -16, 8, 100, 2**17, 64.0, True, None, "64"])
def test_impossible_bins_are_refused(bins: Any) -> None:
    with pytest.raises(CalibrationError, match="cannot have"):
        HistogramObserver(PerTensor(), SharedInputs(), bins=bins)


def test_other_granularities_are_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"up\.input: .*group\[16\]"):
        HistogramObserver(PerGroup(16), SharedInputs(), name="up.input")


def test_inputs_without_common_scales_are_refused_by_name() -> None:
    observer = HistogramObserver(PerChannel(-1), SharedInputs(), name="up.input")
    observer.observe(torch.ones(2, 4))
    with pytest.raises(CalibrationError, match=r"up\.input: .*\(1, 4\) and \(1, 5\)"):
        observer.observe(torch.ones(2, 5))


# --- the data pass --------------------------------------------------------------------------------


def test_a_tensor_read_by_three_modules_is_counted_once(
    make_lm: Callable[..., nn.Module],
    toolkit: Toolkit,
    token_batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []

    def noted(x: Tensor, *args: Any, **options: Any) -> Histogram:
        calls.append(tuple(x.shape))
        return histogram_of(x, *args, **options)

    monkeypatch.setattr(sys.modules["bittern.calibration.histogram"], "histogram_of", noted)
    rule = {"match": {"class": "Linear"}, "input": "int8"}
    recipe = {"rules": [rule], "algorithm": "percentile"}
    toolkit.quantize(make_lm(depth=2), recipe, token_batches)

    per_layer = 2  # the input of q, k and v, and that of o
    assert len(calls) == (2 * per_layer + 1) * len(token_batches)  # and that of the head


@pytest.mark.parametrize("algorithm", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_quantizer_and_the_batch_with_a_bad_value_are_named(
    algorithm: str,
    bad: float,
    granularity: str,
    make_mlp: Callable[..., nn.Module],
    toolkit: Toolkit,
) -> None:
    batches = [torch.randn(3, 8) for _ in range(5)]
    batches[3][1, 2] = bad
    spec = {"format": "int8", "granularity": granularity}
    recipe = {"rules": [{"match": "up", "input": spec}], "algorithm": algorithm}
    with pytest.raises(CalibrationError, match=r"up\.input: .*NaN or Inf in batch 3"):
        toolkit.quantize(make_mlp(), recipe, batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=str)
def test_nothing_waits_for_the_device(granularity: Granularity, deterministic: bool) -> None:
    tensors = [torch.randn(64, 33, device="cuda") * scale for scale in (0, 1, 100, 3)]
    observer = HistogramObserver(granularity, SharedInputs())
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in tensors:
            observer.observe(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    found = observer.result()
    assert found is not None
    expected = observed([x.cpu() for x in tensors], granularity)
    assert torch.equal(found.counts.cpu(), expected.counts)
    assert torch.equal(found.amax.cpu(), expected.amax)
