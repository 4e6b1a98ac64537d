"""Runs an exporter: check, write beside, record, rename."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bittern._version import __version__
from bittern.errors import ExportError
from bittern.exporting.context import ExportContext, Written
from bittern.exporting.directory import staged_directory
from bittern.exporting.packed import check_calibrated, check_plan
from bittern.exporting.probe import make_probe
from bittern.exporting.record import ExportRecord, entry_dict
from bittern.records import Exporter, ExportReport, Plan
from bittern.registry import Registry, bound

__all__ = ["check_export", "choose_exporter", "run_export"]


def choose_exporter(model: nn.Module, registry: Registry, name: str | None) -> Exporter:
    """Return the exporter called ``name``, or the one of highest priority that takes the model.

    Raises:
        ExportError: Unknown name, or the exporter does not take this kind of model.
    """
    if name is not None:
        exporter = registry.exporters.get(name)
        if not _accepts(exporter, model, registry):
            raise ExportError(
                f"the format {name!r} is not for a {type(model).__name__}",
                hint=f"formats that are: {', '.join(_accepting(model, registry))}",
            )
        return exporter
    names = _accepting(model, registry)
    if not names:
        raise ExportError("no export format takes this model")
    return max((registry.exporters.get(n) for n in names), key=lambda e: (e.priority, e.name))


def _accepting(model: nn.Module, registry: Registry) -> list[str]:
    return [n for n in registry.exporters if _accepts(registry.exporters.get(n), model, registry)]


def _accepts(exporter: Exporter, model: nn.Module, registry: Registry) -> bool:
    if exporter.accepts is None:
        return True
    plugin = registry.exporters.plugin(exporter.name)
    return bool(bound(exporter.accepts, plugin=plugin)(model))


def check_export(
    exporter: Exporter, model: nn.Module, context: ExportContext, registry: Registry
) -> None:
    """Refuse what no file or the client cannot hold, before anything is computed.

    Raises:
        ExportError: With the nearest thing that works.
    """
    check_plan(context.plan)
    _check_modules(model, context.plan)
    if exporter.check is not None:
        plugin = registry.exporters.plugin(exporter.name)
        bound(exporter.check, plugin=plugin)(model, context)


def _check_modules(model: nn.Module, plan: Plan) -> None:
    """Refuse a model that is inside of a wrapper, or has layers put around its own."""
    modules = dict(model.named_modules())
    missing = next((path for path in plan.by_module() if path not in modules), None)
    if missing is not None:
        raise ExportError(
            f"a {type(model).__name__} has no module of this name, which the model had that was "
            "quantized",
            where=missing,
            hint="export the model that it wraps; merge adapters into its weights first",
        )


def run_export(
    exporter: Exporter,
    model: nn.Module,
    path: Path,
    context: ExportContext,
    registry: Registry,
    *,
    data: Any = None,
    after: Callable[[ExportReport, Path], None] | None = None,
) -> ExportReport:
    """Write ``model`` to ``path``; when it returns, the directory is whole.

    Args:
        exporter: The format.
        model: The converted, calibrated model.
        path: A directory that is empty or not there.
        context: Services.
        registry: Resolves the exporter's functions.
        data: Batches for the probe.
        after: Called with the report before the directory gets its name.

    Raises:
        ExportError: The model is not calibrated, or the client cannot load it.
        OutputError: The directory cannot be used, or the disk is full.
    """
    check_calibrated(model)
    check_export(exporter, model, context, registry)
    plugin = registry.exporters.plugin(exporter.name)
    write = bound(exporter.write, plugin=plugin, returns=Written)
    with staged_directory(path) as stage:
        written: Written = write(model, stage, context)
        ExportRecord(
            format=exporter.name,
            recipe=context.plan.recipe,
            bittern=__version__,
            entries=entry_dict(context.plan),
            skipped=dict(context.plan.skipped),
            tensors=written.tensors,
            weights=written.weights,
            probe=make_probe(model, context.adapter, data),
        ).write(stage)
        if after is not None:
            after(_sized(written.report, stage, path), stage)
        report = _sized(written.report, stage, path)
    return report  # noqa: RET504 - only after the rename


def _sized(report: ExportReport, stage: Path, path: Path) -> ExportReport:
    files = {
        str(file.relative_to(stage)): file.stat().st_size
        for file in sorted(stage.rglob("*"))
        if file.is_file()
    }
    return replace(report, path=str(path), files=files)
