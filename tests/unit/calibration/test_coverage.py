"""What calibration saw too little of is reported."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.calibration.coverage import borrow_ranges, note_experts, note_saturation
from bittern.calibration.histogram import histogram_of
from bittern.errors import ExportError
from bittern.exporting import check_calibrated
from bittern.nn import named_quantizers
from bittern.nn.observer import SharedInputs
from bittern.numerics import Range
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


class Experts(nn.Module):
    """All tokens go through the first two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.after(self.experts[0](x) + self.experts[1](2 * x))
        return found


def test_an_export_with_unseen_experts_is_refused_until_it_is_allowed(
    toolkit: Toolkit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = Experts().eval(), torch.randn(16, 8)
    toolkit.quantize(model, "int8", [data])
    with pytest.raises(
        ExportError, match=r"2 quantizers saw no data: experts\.2\.input, experts\.3\.input"
    ) as caught:
        toolkit.export(model, tmp_path / "out")
    assert "--allow-uncalibrated" in caught.value.hint
    assert not any(tmp_path.iterdir())
    toolkit.export(model, tmp_path / "out", allow_uncalibrated=True, verify=False)
    ranges = dict(named_quantizers(model))
    for index in (2, 3):
        amax = ranges[f"experts.{index}.input"].amax
        torch.testing.assert_close(amax, 2 * data.abs().amax())
        assert f"experts.{index}.input saw no data; it gets the largest range of 2" in caplog.text


def test_only_what_is_alike_lends_a_range(toolkit: Toolkit) -> None:
    model = Experts()
    model.other = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
    model.eval()
    toolkit.quantize(model, "int8", [torch.randn(16, 8)])
    assert borrow_ranges(model) == ("experts.2.input", "experts.3.input")
    with pytest.raises(ExportError, match=r"2 quantizers saw no data: other\.0\.input, other\.1"):
        check_calibrated(model)


def test_a_range_of_nan_is_not_exported(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    toolkit.quantize(model, "int8", [torch.randn(16, 8)])
    check_calibrated(model)
    quantizer = dict(named_quantizers(model))["0.input"]
    quantizer.set_range(Range(torch.tensor(torch.nan)), check=False)
    with pytest.raises(ExportError, match=r"NaN or Inf: 0\.input"):
        check_calibrated(model)


def test_the_report_says_who_borrowed(toolkit: Toolkit) -> None:
    found = toolkit.quantize(nn.Sequential(nn.Linear(8, 8)), "int8", [torch.randn(4, 8)]).report
    summary = CalibrationSummary(uncalibrated=("a.input", "b.input"), borrowed=("b.input",))
    text = io.StringIO()
    show_report(found.having(calibration=summary), Console(file=text, width=200))
    assert "a.input saw no data and stays unquantized" in text.getvalue()
    assert "b.input saw no data and has the range of others" in text.getvalue()


def test_the_report_shows_both(toolkit: Toolkit) -> None:
    found = toolkit.quantize(nn.Sequential(nn.Linear(8, 8)), "int8", [torch.randn(4, 8)]).report
    summary = CalibrationSummary(
        unseen_experts={"moe.input": (1, 3)}, saturation={"a.input": 0.02, "b.input": 1e-5}
    )
    text = io.StringIO()
    show_report(found.having(calibration=summary), Console(file=text, width=200))
    assert "moe.input: no token went through experts 1, 3; they have the largest" in text.getvalue()
    assert "a.input: 2.0% of the data lies beyond its range" in text.getvalue()
    assert "b.input" not in text.getvalue()
