"""What calibration saw too little of is reported."""

from __future__ import annotations

import io

import torch
from rich.console import Console
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.calibration.coverage import note_experts, note_saturation
from bittern.calibration.histogram import histogram_of
from bittern.nn.observer import SharedInputs
from bittern.records import CalibrationSummary, PerTensor
from bittern.report.console import show_report
from bittern.toolkit import Toolkit


def context() -> CalibrationContext:
    return CalibrationContext(shared=SharedInputs(), access=lambda *_, **__: None)  # type: ignore[arg-type, return-value]


def test_the_share_beyond_a_range_is_that_of_counting() -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000)
    histogram = histogram_of(x, PerTensor(), amax=x.abs().amax())
    noted = context()
    note_saturation(noted, "x", histogram, torch.tensor(2.0))
    share = float((x.abs() > 2).float().mean())
    assert abs(noted.saturation["x"] - share) < 2e-4  # one bin
    note_saturation(noted, "x", histogram, x.abs().amax())
    assert noted.saturation["x"] == 0


def test_experts_without_tokens_are_named() -> None:
    noted = context()
    note_experts(noted, "moe.input", torch.tensor([True, False, True, False]))
    note_experts(noted, "other.input", torch.tensor([True, True]))
    assert noted.unseen_experts == {"moe.input": (1, 3)}


def test_a_clipped_range_is_in_the_summary(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    data: list[Tensor] = [torch.randn(512, 8)]
    recipe = {"extends": "int8", "algorithm": {"percentile": {"p": 99}}}
    summary = toolkit.quantize(model, recipe, data).report.calibration
    assert 0.005 < summary.saturation["0.input"] < 0.011
    assert not toolkit.quantize(
        nn.Sequential(nn.Linear(8, 8)), "int8", data
    ).report.calibration.saturation


def test_the_report_shows_both(toolkit: Toolkit) -> None:
    found = toolkit.quantize(nn.Sequential(nn.Linear(8, 8)), "int8", [torch.randn(4, 8)]).report
    summary = CalibrationSummary(
        unseen_experts={"moe.input": (1, 3)}, saturation={"a.input": 0.02, "b.input": 1e-5}
    )
    text = io.StringIO()
    show_report(found.having(calibration=summary), Console(file=text, width=200))
    assert "moe.input: no token went through experts 1, 3" in text.getvalue()
    assert "a.input: 2.0% of the data lies beyond its range" in text.getvalue()
    assert "b.input" not in text.getvalue()
