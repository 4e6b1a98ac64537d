"""Reports: for people at any width, for machines as plain JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor, nn

from bittern.records import (
    CalibrationSummary,
    Evaluation,
    ExportReport,
    Finding,
    LayerError,
    Plan,
    Verification,
)
from bittern.report import Report, plain
from bittern.report.blocks import collapse
from bittern.report.console import human_bytes, show_evaluation, show_report, show_verification
from bittern.report.progress import ConsoleProgress
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]


@pytest.fixture
def plan(make_lm: Make, toolkit: Toolkit) -> Plan:
    return toolkit.plan(make_lm(depth=12), "int8")


@pytest.fixture
def full(plan: Plan) -> Report:
    """A report with everything in it."""
    return Report(
        plan=replace(plan, warnings=("something odd",)),
        calibration=CalibrationSummary(batches=3, seconds=1.5, uncalibrated=("layers.0.q.input",)),
        evaluation=Evaluation(
            perplexity=12.5,
            reference_perplexity=12.0,
            tokens=1000,
            accuracy=0.5,
            reference_accuracy=0.75,
            samples=8,
            kl=0.001,
            output_sqnr_db=math.inf,
            layers=(LayerError(module="a", sqnr_db=-math.inf), LayerError(module="", sqnr_db=9.0)),
        ),
        export=ExportReport(path="/tmp/out", format="safetensors", files={"a": 1500}),
        verification=Verification(
            ok=False, path="/tmp/out", client="c", findings=(Finding("t", "is missing", "again"),)
        ),
    )


def shown(show: Callable[[Console], object], width: int = 100) -> str:
    file = io.StringIO()
    show(Console(file=file, width=width))
    return file.getvalue()


# --- collapsing blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], []),
        (["norm"], [("norm", 1)]),
        ([""], [("", 1)]),
        (["layers.0.q"], [("layers.0.q", 1)]),
        ([f"layers.{i}.q" for i in range(32)], [("layers.{0..31}.q", 32)]),
        (["layers.0.q", "layers.1.q"], [("layers.{0..1}.q", 2)]),
        ([f"h.{i}" for i in (0, 1, 2, 5, 7, 8)], [("h.{0..2,5,7..8}", 6)]),
        (["0", "1", "3"], [("{0..1,3}", 3)]),
        (["10.a", "2.a", "9.a"], [("{2,9..10}.a", 3)]),
        (
            [f"l.{i}.e.{j}.w" for i in range(2) for j in range(4)],
            [("l.{0..1}.e.{0..3}.w", 8)],
        ),
        ([f"l.3.e.{j}" for j in range(4)], [("l.3.e.{0..3}", 4)]),
        (["a.0", "b.0", "a.1"], [("a.{0..1}", 2), ("b.0", 1)]),
        (["conv1", "conv2", "layer1.0"], [("conv1", 1), ("conv2", 1), ("layer1.0", 1)]),
        (["a.1b.2", "a.1b.3"], [("a.1b.{2..3}", 2)]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_paths_that_differ_in_block_numbers_take_one_line(
    paths: list[str], expected: list[tuple[str, int]]
) -> None:
    assert [(text, n) for text, _, n in collapse((path, "v") for path in paths)] == expected


def test_other_values_take_other_lines() -> None:
    items = [("l.0", "x"), ("l.1", "y"), ("l.2", "x"), ("l.3", "x")]
    assert collapse(items) == [("l.{0,2..3}", "x", 3), ("l.1", "y", 1)]


# --- for machines ---------------------------------------------------------------------------------


def test_a_report_is_json_whatever_it_holds(full: Report, tmp_path: Path) -> None:
    data = full.to_dict()
    text = json.dumps(data, allow_nan=False)

    assert json.loads(text) == data
    full.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == data
    assert data["evaluation"]["output_sqnr_db"] is None
    assert data["evaluation"]["layers"][0] == {"module": "a", "sqnr_db": None}
    assert data["evaluation"]["perplexity"] == 12.5
    assert data["export"]["bytes"] == 1500
    assert data["verification"]["findings"][0]["problem"] == "is missing"
    assert data["calibration"]["uncalibrated"] == ["layers.0.q.input"]
    assert data["warnings"] == ["something odd"]


def test_a_report_holds_the_plan(plan: Plan) -> None:
    import bittern

    data = Report(plan=plan).to_dict()

    assert data["bittern"] == bittern.__version__
    assert data["recipe"] == "int8"
    assert data["skipped"] == dict(plan.skipped)
    assert data["effective_bits"] == plan.effective_bits
    assert (data["bytes_before"], data["bytes_after"]) == (plan.bytes_before, plan.bytes_after)
    assert len(data["entries"]) == len(plan.entries)
    assert data["entries"][0] == {
        "module": "layers.0.q",
        "slot": "weight",
        "format": "int8",
        "granularity": "channel",
        "dynamic": False,
        "rule": "torch.nn.modules.linear:Linear",
        "plugin": "bittern",
        "shape": [16, 16],
        "like": None,
    }
    assert data["evaluation"] is data["export"] is data["verification"] is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_json_cannot_say_is_null(value: float) -> None:
    assert plain(LayerError(module="a", sqnr_db=value)) == {"module": "a", "sqnr_db": None}
    assert plain(None) is None


def test_parts_are_added_to_a_copy(plan: Plan) -> None:
    report = Report(plan=plan)
    more = report.having(evaluation=Evaluation(samples=3))

    assert report.evaluation is None
    assert more.evaluation is not None
    assert more.plan is plan


# --- for people -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_report_can_be_shown_at_any_width(width: int, full: Report) -> None:
    text = shown(lambda console: show_report(full, console), width)

    assert max(len(line) for line in text.splitlines()) <= width
    squeezed = "".join(c for c in text if c.isalnum())
    for word in ("int8", "somethingodd", "missing", "safetensors"):
        assert word in squeezed


def test_a_report_shows_blocks_skips_warnings_and_numbers(full: Report) -> None:
    text = shown(lambda console: show_report(full, console), 200)

    assert "layers.{0..11}.q" in text
    assert "weight: int8/channel" in text
    assert "left as it is" in text
    for skipped in ("embed", "norm"):
        assert skipped in text
    assert "no recipe rule names it" in text
    assert "warning: something odd" in text
    assert "layers.0.q.input saw no data" in text
    assert "calibrated on 3 batches" in text
    assert "+4.17%" in text
    assert "NOT verified by c: /tmp/out" in text
    assert "t: is missing; again" in text
    assert "1.5 kB" in text
    assert f"{full.plan.effective_bits:.2f} bits per quantized weight" in text


def test_the_terminal_is_the_default(
    full: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        full.show()
        assert "int8" in capsys.readouterr().out


def test_a_report_without_extras_shows_the_plan_alone(plan: Plan) -> None:
    text = shown(lambda console: show_report(Report(plan=plan), console), 120)

    assert "quality" not in text
    assert "verified" not in text
    assert "calibrated" not in text


@pytest.mark.parametrize("odd", ["[red]", "[/red]", "[/tmp/x]", "layers.[ab]*", "\\[x]", "[a-z]+"])
def test_brackets_in_names_are_text(odd: str, plan: Plan) -> None:
    entry = replace(plan.entries[0], module=f"m{odd}", plugin=f"p{odd}")
    report = Report(
        plan=replace(
            plan,
            recipe=f"r{odd}",
            entries=(entry,),
            skipped={f"s{odd}": f"why{odd}"},
            warnings=(f"warn{odd}",),
        ),
        calibration=CalibrationSummary(uncalibrated=(f"u{odd}",)),
        evaluation=Evaluation(layers=(LayerError(module=f"l{odd}", sqnr_db=1.0),)),
        export=ExportReport(path=f"path{odd}", format="safetensors"),
        verification=Verification(
            ok=False,
            path=f"v{odd}",
            client=f"c{odd}",
            findings=(Finding(f"t{odd}", f"bad{odd}", f"do{odd}"),),
            checks=(f"check{odd}",),
        ),
    )
    text = shown(lambda console: show_report(report, console), 250)

    starts = ("m", "p", "r", "s", "why", "warn", "u", "l", "path", "v", "c", "t", "bad", "do")
    for start in (*starts, "check"):
        assert f"{start}{odd}" in text


def test_an_evaluation_shows_what_was_measured_only() -> None:
    nothing = shown(lambda console: show_evaluation(Evaluation(samples=7), console))
    assert "rows" in nothing
    for word in ("perplexity", "accuracy", "KL", "SQNR"):
        assert word not in nothing

    infinite = Evaluation(perplexity=math.inf, reference_perplexity=2.0, output_sqnr_db=math.inf)
    assert "inf" in shown(lambda console: show_evaluation(infinite, console))


def test_a_sound_checkpoint_is_shown_as_verified() -> None:
    verdict = Verification(ok=True, path="out", client="c", checks=("10 tensors read back",))
    text = shown(lambda console: show_verification(verdict, console))

    assert "verified by c: out" in text
    assert "NOT" not in text
    assert "10 tensors read back" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (31_500_000, "31.5 MB"),
        (2e9, "2.0 GB"),
        (7e12, "7.00 TB"),
        (5e15, "5000.00 TB"),
    ],
)
def test_bytes_are_shown_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert human_bytes(count) == text


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("total", [None, 3])
def test_progress_yields_everything_in_order(total: int | None, *, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    assert list(ConsoleProgress(console).track(iter("abc"), "working", total=total)) == list("abc")


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bittern.report.progress.EVERY", 0.0)
    file = io.StringIO()
    progress = ConsoleProgress(Console(file=file, width=80))
    list(progress.track([1, 2], "working", total=2))

    lines = file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["working: 1/2", "working: 2/2"]


def test_progress_is_shown_while_data_runs(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor], tmp_path: Path
) -> None:
    steps: list[tuple[str, int | None]] = []

    class Listening:
        def track(self, items: Any, what: str, *, total: int | None = None) -> Any:
            steps.append((what, total))
            yield from items

    model = make_mlp()
    toolkit.quantize(model, "int8", batches, progress=Listening())
    toolkit.evaluate(model, iter(batches), progress=Listening())
    toolkit.export(model, tmp_path / "out", progress=Listening())

    assert steps == [("calibrating", 3), ("evaluating", None), ("packing", 2)]
