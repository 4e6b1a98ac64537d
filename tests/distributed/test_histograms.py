"""Histograms of two ranks (gloo) are the histogram of all their data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.calibration.histogram import Histogram, HistogramObserver
from bittern.calibration.observe import observe_histograms
from bittern.nn import TensorQuantizer
from bittern.nn.observer import SharedInputs
from bittern.records import NumberFormat, PerChannel, PerTensor, QuantizerSpec
from bittern.testing.processes import run_distributed

INT8 = NumberFormat(
    name="int8", bits=8, codec="bittern.numerics.integers:IntCodec", params={"bits": 8}
)
SPECS = {
    "tensor": QuantizerSpec(INT8, PerTensor()),
    "channel": QuantizerSpec(INT8, PerChannel(-1)),
    "once": QuantizerSpec(INT8, PerTensor()),  # sees the last batch only
    "never": QuantizerSpec(INT8, PerTensor()),
}
SCALES = (0.0, 1.0, 300.0, 5.0)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 6, generator=generator) * scale for scale in SCALES]


def histograms(data: list[Tensor]) -> dict[str, Histogram | None]:
    quantizers = nn.ModuleDict({n: TensorQuantizer(spec, name=n) for n, spec in SPECS.items()})

    def forward() -> int:
        for x in data:
            quantizers["tensor"](x)
            quantizers["channel"](x)
            if torch.equal(x, batches()[-1]):
                quantizers["once"](x)
        return len(data)

    context: Any = CalibrationContext(shared=SharedInputs(), access=lambda: None)  # unused
    watched = {name: q for name, q in quantizers.items() if isinstance(q, TensorQuantizer)}
    return observe_histograms(quantizers, watched, forward, context, bins=256)


def on_rank(rank: int, world: int) -> dict[str, Any]:
    found = histograms(batches()[rank::world])
    return {
        name: None if h is None else {"counts": h.counts, "amax": h.amax, "width": h.width}
        for name, h in found.items()
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks found on its half of the batches."""
    return run_distributed(on_rank, world=2)


def test_both_ranks_have_the_histogram_of_all_data(ranks: list[dict[str, Any]]) -> None:
    expected = histograms(batches())
    for found in ranks:
        for name in ("tensor", "channel", "once"):
            own = expected[name]
            assert own is not None
            assert torch.equal(found[name]["counts"], own.counts)
            assert torch.equal(found[name]["amax"], own.amax)
            assert torch.equal(found[name]["width"], own.width)


def test_one_process_is_the_sum_of_its_batches() -> None:
    for name, spec in SPECS.items():
        found = histograms(batches())[name]
        if name in ("tensor", "channel"):
            observer = HistogramObserver(spec.granularity, SharedInputs(), bins=256)
            observer.observe(torch.cat(batches()))
            expected = observer.result()
            assert found is not None
            assert expected is not None
            assert torch.equal(found.counts, expected.counts)


def test_what_no_rank_saw_has_no_histogram(ranks: list[dict[str, Any]]) -> None:
    assert [found["never"] for found in ranks] == [None, None]
