"""``bittern quantize``: the whole way, ordered so that mistakes surface before long work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bittern.cli.context import App, json_option, pass_app
from bittern.cli.options import (
    batch_option,
    check_data_file,
    load_options,
    model_argument,
    recipe_options,
    seq_len_option,
)
from bittern.cli.verify import verdict_error
from bittern.errors import BitternError, CalibrationError, VerificationError

if TYPE_CHECKING:
    from bittern.records import Exporter, Plan
    from bittern.report import Report
    from bittern.toolkit import Toolkit

__all__ = ["quantize"]

EPILOG = """\b
Examples:
  bittern quantize MODEL --recipe int8 --data text.txt --output out/
  bittern quantize MODEL -r int4 --output out/ --eval heldout.txt
  bittern quantize MODEL -r int8 --data text.txt --device disk --work-dir work/ --output out/
  bittern quantize MODEL -r int8 -o rules.0.input=fp8 --data text.txt --output out/"""


@click.command(epilog=EPILOG)
@model_argument
@recipe_options
@click.option("--data", help="Calibration data: .txt, .jsonl, .npy, or what a plugin reads.")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to write; must be empty or not there.",
)
@click.option(
    "--format", "export_format", help="Export format; the best one for the model by default."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Rows of calibration data at most.",
)
@seq_len_option
@batch_option
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    help="Calibrate block by block and keep what is done here; a killed run goes on from there.",
)
@click.option(
    "--allow-uncalibrated",
    is_flag=True,
    help="Give what saw no data (experts without tokens) the largest range of others like it.",
)
@click.option("--eval", "eval_data", help="Measure quality before and after on all of this data.")
@load_options
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of any sampling.")
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Load the result in its client and compare; on by default.",
)
@json_option
@pass_app
def quantize(
    app: App,
    *,
    model: str,
    recipe: str,
    overrides: tuple[str, ...],
    data: str | None,
    output: Path,
    export_format: str | None,
    samples: int,
    seq_len: int | None,
    batch_size: int,
    work_dir: Path | None,
    allow_uncalibrated: bool,
    eval_data: str | None,
    dtype: str,
    device: str,
    seed: int,
    verify: bool,
) -> None:
    """Quantize a model, export it, verify it.

    MODEL is a directory or a hub name. The output directory is whole or not there. Exit code 0
    means that a client loaded it and found what was computed here (without --no-verify).
    """
    from bittern.calibration.coverage import borrow_ranges
    from bittern.exporting import check_calibrated, check_output
    from bittern.records import DataConfig, LoadConfig

    check_output(output)
    check_data_file(data)
    check_data_file(eval_data)
    toolkit = app.toolkit
    whole = toolkit.recipe(recipe, overrides)

    app.say(f"loading {model}")
    network = toolkit.load(model, LoadConfig(dtype=dtype, device=device))
    plan = toolkit.plan(network, whole)
    exporter = toolkit.check_export(network, plan, export_format)
    _check_client(exporter, verify=verify)
    _check_data(toolkit, plan, data)
    rows = DataConfig(samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed)
    batches = _read(app, data, network, rows)
    heldout = _read(app, eval_data, network, replace(rows, samples=None))

    app.say(f"quantizing {len(plan.modules)} modules")
    report = toolkit.quantize(
        network, plan, batches, work_dir=work_dir, progress=app.progress
    ).report
    if allow_uncalibrated:
        borrowed = borrow_ranges(network)
        report = report.having(calibration=replace(report.calibration, borrowed=borrowed))
    check_calibrated(network)  # before long work
    if heldout is not None:
        report = report.having(evaluation=toolkit.evaluate(network, heldout, progress=app.progress))
    app.say(f"writing {output}")
    written = toolkit.export(
        network,
        output,
        format=exporter.name,
        verify=False,
        data=batches,
        progress=app.progress,
    )
    app.written = output
    report = report.having(export=written)
    failure: BitternError | None = None
    if verify:
        app.say(f"verifying {output} in {exporter.client}")
        report, failure = _verified(toolkit, output, report)
    _answer(app, report, failure, verify=verify)


def _check_client(exporter: Exporter, *, verify: bool) -> None:
    if verify and exporter.verify is None:
        raise VerificationError(
            f"no client for the format {exporter.name!r} can run here",
            hint="--no-verify writes it all the same",
        )


def _check_data(toolkit: Toolkit, plan: Plan, data: str | None) -> None:
    """Raise if the plan needs data and there is none, before the model is converted."""
    if data is not None:
        return
    needs = {n for name, _ in plan.algorithm for n in toolkit.registry.algorithms.get(name).needs}
    static = [e.path for e in plan.entries if e.needs_data]
    if static or needs - {"data"}:
        why = f"{static[0]} is static" if static else f"for {', '.join(sorted(needs - {'data'}))}"
        raise CalibrationError(
            f"the recipe {plan.recipe!r} needs calibration data ({why}), and there is none",
            hint="give --data FILE, or use a recipe that needs none, such as int8-weight-only",
        )


def _read(app: App, source: str | None, model: Any, config: Any) -> Any:
    if source is None:
        return None
    app.say(f"reading {source}")
    return app.toolkit.data(source, model, config)


def _verified(toolkit: Toolkit, output: Path, report: Report) -> tuple[Report, BitternError | None]:
    """Return the report with the client's verdict, and what is wrong; the files stay."""
    try:
        verdict = toolkit.verify(output)
    except BitternError as error:
        return report, error
    return report.having(verification=verdict), verdict_error(verdict)


def _answer(app: App, report: Report, failure: BitternError | None, *, verify: bool) -> None:
    if not app.json:
        from bittern.report.console import show_report

        show_report(report, app.console)
        if not verify:
            app.console.print("[yellow]not verified[/] (--no-verify)")
    if failure is not None:
        app.fail(failure, report.to_dict())
    if app.json:
        app.emit(report.to_dict())
