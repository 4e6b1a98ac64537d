"""The checkpoint format of the framework's engine: its file, its names, its limits.

The engine has other names than the model, as engines do. `NAMES` is the whole difference.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from bittern.errors import ExportError, VerificationError
from bittern.exporting import (
    ExportContext,
    ExportRecord,
    Written,
    checksum,
    checksums,
    packed_modules,
    plain_tensors,
)
from bittern.numerics import dequantize
from bittern.records import ExportReport, Finding, Verification
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Part of a model's tensor name to what the engine calls it.
NAMES = {
    r"\battention\.query\b": "attn.q",
    r"\battention\.key\b": "attn.k",
    r"\battention\.value\b": "attn.v",
    r"\battention\.out\b": "attn.o",
    r"\bblocks\b": "layers",
}
FORMATS = ("int8",)


def engine_name(name: str) -> str:
    """Return the engine's name of a tensor of the model."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def accepts(model: nn.Module) -> bool:
    """Say whether the engine serves this kind of model."""
    return any(cls.__module__.startswith("heron_framework.") for cls in map(type, model.modules()))


def check(model: nn.Module, context: ExportContext) -> None:
    """Refuse what the engine cannot run, before anything is computed.

    Raises:
        ExportError: A format that it does not know, or scales that it cannot place.
    """
    for entry in context.plan.entries:
        if entry.format not in FORMATS:
            raise ExportError(
                f"the engine has no {entry.format}",
                where=f"{entry.module}.{entry.slot}",
                hint=f"formats that it has: {', '.join(FORMATS)}",
            )


def write(model: nn.Module, path: Path, context: ExportContext) -> Written:
    """Write codes and scales into the empty directory ``path``."""
    from heron_framework.engine import FILE

    tensors: dict[str, Tensor] = dict(plain_tensors(model, context.plan, dtype=None))
    simulated: dict[str, int] = {}
    for item in context.progress.track(
        packed_modules(model, context.access), "packing", total=len(context.plan.modules)
    ):
        prefix = f"{item.path}." if item.path else ""
        for name, weight in item.weights.items():
            tensors[f"{prefix}{name}"] = weight.codes
            tensors[f"{prefix}{name}.scale"] = weight.scales.scale
            decoded = dequantize(replace(weight, dtype=torch.float32))
            simulated[f"{prefix}{name}"] = checksum(decoded)
        for slot, scale in item.inputs.items():
            tensors[f"{prefix}{slot}.scale"] = scale
    renamed = {engine_name(n): t.detach().cpu().contiguous() for n, t in tensors.items()}
    if len(renamed) < len(tensors):
        raise ExportError("two tensors get one name in the engine", hint="look at NAMES")
    save_file(renamed, path / FILE)
    return Written(
        report=ExportReport(
            path=str(path), format="heron", tensors=len(renamed), quantized=len(simulated)
        ),
        tensors=checksums(renamed),
        weights=simulated,
    )


def verify(path: Path, record: ExportRecord | None) -> Verification:
    """Let the engine load what was written, and compare what it sees with what was simulated."""
    from heron_framework.engine import FILE, load

    if record is None:
        raise VerificationError("there is no bittern.json", where=str(path))
    again = "export the model again"
    try:
        stored, seen = checksums(load_file(path / FILE)), load(path)
    except (OSError, SafetensorError) as error:
        finding = Finding(FILE, f"cannot be read: {error}", again)
        return Verification(ok=False, path=str(path), client="heron_framework", findings=(finding,))
    findings = [
        Finding(name, "is missing, or changed since it was written", again)
        for name, value in record.tensors.items()
        if stored.get(name) != value
    ]
    findings += [
        Finding(name, "the engine sees another weight than was simulated", again)
        for name, value in record.weights.items()
        if engine_name(name) in seen and checksum(seen[engine_name(name)]) != value
    ]
    return Verification(
        ok=not findings,
        path=str(path),
        client="heron_framework",
        findings=tuple(findings),
        checks=(f"{len(record.weights)} weights as the engine sees them",),
    )
