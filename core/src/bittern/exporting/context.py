"""What an exporter is given besides the model and the directory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from bittern.records import ExportReport, ModelAdapter, Plan
from bittern.runtime import SILENT, Progress

__all__ = ["ExportContext", "Written"]


@dataclass(frozen=True, kw_only=True)
class ExportContext:
    """Services for an exporter.

    Attributes:
        plan: What was quantized.
        adapter: What the model's framework knows.
        access: Makes a module's weights real tensors.
        progress: Shows where long work is.
    """

    plan: Plan
    adapter: ModelAdapter
    access: Callable[..., AbstractContextManager[None]]
    progress: Progress = SILENT


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an exporter's ``write`` returns: the report and the checksums for bittern.json.

    Attributes:
        report: For people.
        tensors: Tensor name in the files to checksum, see `bittern.exporting.checksum`.
        weights: Parameter name to the checksum of its simulated float32 values.
    """

    report: ExportReport
    tensors: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
