"""Reports on a terminal (rich)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bittern.records import Evaluation, Plan, PlanEntry, Verification
from bittern.report.blocks import collapse
from bittern.report.report import Report

__all__ = ["human_bytes", "show_evaluation", "show_plan", "show_report", "show_verification"]


SATURATED = 0.001  # of the data; less is what a search gives up for finer steps


def human_bytes(count: float) -> str:
    """Return bytes as ``"31.5 MB"`` (powers of 1000, as disks count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Show who is quantized how, and what is skipped and why."""
    console = console if console is not None else Console()
    table = Table(title=f"{escape(plan.recipe)}: {len(plan.modules)} modules quantized")
    for column in ("modules", "n", "slots", "rule of"):
        table.add_column(column, justify="right" if column == "n" else "left", overflow="fold")
    described = [
        (
            path or "(model)",
            (
                "\n".join(f"{slot}: {entry.spec}" for slot, entry in slots.items()),
                _rule_of(next(iter(slots.values()))),
            ),
        )
        for path, slots in plan.by_module().items()
    ]
    for pattern, (text, plugin), count in collapse(described):
        table.add_row(escape(pattern), str(count), escape(text), escape(plugin))
    console.print(table)
    if plan.skipped:
        skipped = Table(title="left as it is")
        for column in ("modules", "n", "why"):
            justify: Literal["left", "right"] = "right" if column == "n" else "left"
            skipped.add_column(column, justify=justify, overflow="fold")
        for pattern, why, count in collapse((p or "(model)", w) for p, w in plan.skipped.items()):
            skipped.add_row(escape(pattern), str(count), escape(str(why)))
        console.print(skipped)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    console.print(
        f"{plan.parameters:,} parameters, {human_bytes(plan.bytes_before)} -> "
        f"{human_bytes(plan.bytes_after)} "
        f"({plan.bytes_before / max(plan.bytes_after, 1):.2f} x smaller), "
        f"{plan.effective_bits:.2f} bits per quantized weight, scales included"
    )


def _rule_of(entry: PlanEntry) -> str:
    return entry.plugin if entry.like is None else f"{entry.plugin}, like {entry.like}"


def show_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Show quality, and the worst layers."""
    console = console if console is not None else Console()
    table = Table(title="quality", show_header=False)
    rows: list[tuple[str, str]] = []
    if evaluation.perplexity is not None:
        rows.append(("perplexity", f"{evaluation.perplexity:.4f}"))
        if evaluation.reference_perplexity is not None:
            change = evaluation.perplexity / evaluation.reference_perplexity - 1
            rows.append(("  unquantized", f"{evaluation.reference_perplexity:.4f}"))
            rows.append(("  change", f"{change:+.2%}"))
        rows.append(("tokens", f"{evaluation.tokens:,}"))
    if evaluation.accuracy is not None:
        rows.append(("accuracy", f"{evaluation.accuracy:.4f}"))
        if evaluation.reference_accuracy is not None:
            rows.append(("  unquantized", f"{evaluation.reference_accuracy:.4f}"))
    if evaluation.kl is not None:
        rows.append(("KL to unquantized", f"{evaluation.kl:.3g} nats"))
    if evaluation.output_sqnr_db is not None:
        rows.append(("output SQNR", f"{evaluation.output_sqnr_db:.1f} dB"))
    rows.append(("rows", f"{evaluation.samples:,}"))
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    if evaluation.layers:
        worst = Table(title="layers that lose most (same input, quantized against not)")
        worst.add_column("module")
        worst.add_column("SQNR", justify="right")
        for layer in evaluation.layers[:8]:
            worst.add_row(escape(layer.module) or "(model)", f"{layer.sqnr_db:.1f} dB")
        console.print(worst)


def _show_saturation(shares: Mapping[str, float], console: Console) -> None:
    """Show where the most of the calibration data lies beyond a range, if it is a lot."""
    worst = sorted(shares.items(), key=lambda item: -item[1])[:3]
    for name, share in worst:
        if share >= SATURATED:
            console.print(f"{escape(name)}: {share:.1%} of the data lies beyond its range")


def show_verification(verification: Verification, console: Console | None = None) -> None:
    """Show the verdict and every finding."""
    console = console if console is not None else Console()
    verdict = "[green]verified[/]" if verification.ok else "[red]NOT verified[/]"
    console.print(f"{verdict} by {escape(verification.client)}: {escape(verification.path)}")
    for check in verification.checks:
        console.print(f"  {escape(check)}")
    for finding in verification.findings:
        what = escape(finding.tensor_or_field)
        text = escape(f"{finding.problem}; {finding.remedy}")
        console.print(f"  [red]{what}[/]: {text}")


def show_report(report: Report, console: Console | None = None) -> None:
    """Show everything a report holds."""
    console = console if console is not None else Console()
    show_plan(report.plan, console)
    calibration = report.calibration
    if calibration.batches:
        console.print(f"calibrated on {calibration.batches} batches, {calibration.seconds:.1f} s")
    for name in calibration.uncalibrated:
        left = "has the range of others" if name in calibration.borrowed else "stays unquantized"
        console.print(f"[yellow]warning:[/] {escape(name)} saw no data and {left}")
    for name, experts in calibration.unseen_experts.items():
        some = ", ".join(map(str, experts[:8])) + (" ..." if len(experts) > 8 else "")
        what = f"{escape(name)}: no token went through experts {some}"
        weight = any(e.path == name and e.kind == "weight" for e in report.plan.entries)
        instead = "" if weight else "; they have the largest range of the others"
        console.print(f"[yellow]warning:[/] {what}{instead}")
    _show_saturation(calibration.saturation, console)
    if report.evaluation is not None:
        show_evaluation(report.evaluation, console)
    if report.export is not None:
        size = human_bytes(report.export.bytes)
        console.print(f"wrote {escape(report.export.path)} ({report.export.format}, {size})")
    if report.verification is not None:
        show_verification(report.verification, console)
