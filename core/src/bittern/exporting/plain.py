"""Core's own export: one safetensors file and bittern.json. Needs no framework on either side.

Layout: ``{path}.{tensor}`` holds the codes, one per byte (int8, uint8, or the float8 dtype),
``{path}.{tensor}_scale`` the float32 scales, and where the format has them ``_zero_point`` and
``_global_scale``; ``{path}.{slot}_scale`` and ``_zero_point`` are those of static activation
quantizers. Every other tensor keeps its name.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from bittern.errors import ExportError, VerificationError
from bittern.exporting.context import ExportContext, Written
from bittern.exporting.packed import packed_modules, plain_tensors
from bittern.exporting.record import ExportRecord, checksum, checksums
from bittern.numerics import dequantize
from bittern.reading import load_tensors
from bittern.records import ExportReport, Finding, Verification

__all__ = ["verify_plain", "write_plain"]

NAME = "safetensors"
TENSORS = "model.safetensors"


def write_plain(model: nn.Module, path: Path, context: ExportContext) -> Written:
    """Write ``model.safetensors`` into ``path``."""
    plan = context.plan
    tensors = plain_tensors(model, plan, dtype=context.adapter.dtype)
    simulated: dict[str, int] = {}
    total = len(plan.modules)
    packed = packed_modules(model, context.access)
    for item in context.progress.track(packed, "packing", total=total):
        prefix = f"{item.path}." if item.path else ""
        added: dict[str, Tensor] = {}
        for name, weight in item.weights.items():
            added[f"{prefix}{name}"] = weight.codes
            added[f"{prefix}{name}_scale"] = weight.scales.scale.contiguous()
            if weight.scales.zero_point is not None:
                added[f"{prefix}{name}_zero_point"] = weight.scales.zero_point.contiguous()
            if weight.scales.global_scale is not None:
                added[f"{prefix}{name}_global_scale"] = weight.scales.global_scale.contiguous()
            simulated[f"{prefix}{name}"] = checksum(dequantize(weight).float())
        for slot, scale in item.inputs.items():
            added[f"{prefix}{slot}_scale"] = scale.contiguous()
        for slot, zero in item.zero_points.items():
            added[f"{prefix}{slot}_zero_point"] = zero.contiguous()
        for name in added.keys() & tensors.keys():
            raise ExportError(
                f"the model has a tensor {name!r} of its own, the name of our scale",
                hint="rename it, or leave this module out of the recipe",
            )
        tensors.update(added)
    save_file({k: v.detach().cpu() for k, v in tensors.items()}, path / TENSORS)
    return Written(
        report=ExportReport(
            path=str(path), format=NAME, tensors=len(tensors), quantized=len(simulated)
        ),
        tensors=checksums(tensors),
        weights=simulated,
    )


def verify_plain(path: Path, record: ExportRecord | None) -> Verification:
    """Read the files back and compare every tensor with what was written."""
    if record is None:
        raise VerificationError("there is no bittern.json", where=str(path))
    try:
        tensors = load_tensors(path / TENSORS, error=VerificationError, within=path)
    except VerificationError as error:
        finding = Finding(TENSORS, error.what, "export the model again")
        return Verification(ok=False, path=str(path), client=NAME, findings=(finding,))
    findings = compare_checksums(record, checksums(tensors))
    return Verification(
        ok=not findings,
        path=str(path),
        client=NAME,
        findings=tuple(findings),
        checks=(f"{len(tensors)} tensors read back",),
    )


def compare_checksums(record: ExportRecord, found: dict[str, int]) -> list[Finding]:
    """Return a finding for every tensor that is missing, unexpected or changed."""
    findings = [
        Finding(name, "is missing", "export the model again")
        for name in record.tensors
        if name not in found
    ]
    findings += [
        Finding(name, "was not written by the export", "remove it, or export the model again")
        for name in found
        if name not in record.tensors
    ]
    findings += [
        Finding(name, "changed since it was written", "export the model again")
        for name, value in found.items()
        if record.tensors.get(name, value) != value
    ]
    return findings
