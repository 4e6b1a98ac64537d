"""The report of a quantization: for people, for machines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern._version import __version__
from bittern.records import (
    CalibrationSummary,
    Evaluation,
    ExportReport,
    Plan,
    Verification,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Report", "Result", "plain"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model and what it cost.

    Attributes:
        plan: Who was quantized how, and what was skipped and why.
        calibration: What calibration saw.
        evaluation: Quality, where it was measured.
        export: What was written.
        verification: The client's verdict.
    """

    plan: Plan
    calibration: CalibrationSummary = field(default_factory=CalibrationSummary)
    evaluation: Evaluation | None = None
    export: ExportReport | None = None
    verification: Verification | None = None

    def having(self, **parts: Any) -> Report:
        """Return the report with further parts."""
        return replace(self, **parts)

    def show(self) -> None:
        """Show the report on the terminal, identical blocks on one line."""
        from bittern.report.console import show_report

        show_report(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        from bittern.exporting.record import entry_dict

        plan = self.plan
        return {
            "bittern": __version__,
            "recipe": plan.recipe,
            "entries": [
                {**row, "like": entry.like}
                for row, entry in zip(entry_dict(plan), plan.entries, strict=True)
            ],
            "skipped": dict(plan.skipped),
            "warnings": list(plan.warnings),
            "parameters": plan.parameters,
            "effective_bits": plan.effective_bits,
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
            "calibration": plain(self.calibration),
            "evaluation": plain(self.evaluation),
            "export": plain(self.export),
            "verification": plain(self.verification),
        }

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        text = json.dumps(self.to_dict(), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Result:
    """What `bittern.quantize` returns.

    Attributes:
        model: The model that was given, now quantized.
        plan: What was decided.
        report: What was done.
    """

    model: nn.Module
    plan: Plan
    report: Report


def plain(record: Any) -> dict[str, Any] | None:
    """Return a record as data that JSON can hold: infinities become ``None``."""
    if record is None:
        return None
    data = asdict(record)
    if isinstance(record, ExportReport):
        data["bytes"] = record.bytes
    found = _finite(data)
    assert isinstance(found, dict)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
