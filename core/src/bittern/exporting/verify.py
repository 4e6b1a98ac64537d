"""Finds out who wrote a checkpoint and lets the exporter's client judge it."""

from __future__ import annotations

from pathlib import Path

from bittern.errors import VerificationError
from bittern.exporting.record import ExportRecord
from bittern.reading import read_json
from bittern.records import Exporter, Verification
from bittern.registry import Registry, bound

__all__ = ["run_verification"]


def run_verification(path: Path, registry: Registry, *, client: str | None = None) -> Verification:
    """Verify the checkpoint in ``path``.

    Args:
        path: A directory that an exporter, or another tool, wrote.
        registry: Knows the exporters.
        client: Name of the client, where a format has several.

    Raises:
        VerificationError: It is no checkpoint, or no client for it can run here.
    """
    if not path.is_dir():
        raise VerificationError(
            "there is no such directory", where=str(path), hint="give the output of an export"
        )
    record = ExportRecord.read(path)
    exporter = _exporter(path, record, registry)
    if client is not None and client != exporter.client:
        raise VerificationError(
            f"the client {client!r} cannot be run for the format {exporter.name!r}",
            where=str(path),
            hint=f"known: {exporter.client}",
        )
    if exporter.verify is None:
        raise VerificationError(
            f"no client for the format {exporter.name!r} can run here", where=str(path)
        )
    plugin = registry.exporters.plugin(exporter.name)
    verify = bound(exporter.verify, plugin=plugin, returns=Verification)
    verdict: Verification = verify(path, record)
    return verdict


def _exporter(path: Path, record: ExportRecord | None, registry: Registry) -> Exporter:
    if record is not None:
        return registry.exporters.get(record.format)
    config = path / "config.json"
    method = None
    if config.exists() or config.is_symlink():
        data = read_json(config, error=VerificationError, strict=False)
        settings = data.get("quantization_config") if isinstance(data, dict) else None
        method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in registry.exporters:
        raise VerificationError(
            "this is not a quantized checkpoint that any plugin knows",
            where=str(path),
            hint=f"known formats: {', '.join(registry.exporters)}",
        )
    return registry.exporters.get(method)
