"""Verifies a compressed-tensors checkpoint: its tensors, then what the real client computes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from torch import Tensor

from bittern.errors import VerificationError
from bittern.exporting import ExportRecord, Probe, checksum
from bittern.exporting.plain import compare_checksums
from bittern.reading import load_tensors, read_json
from bittern.records import Finding, Verification
from bittern_huggingface.compressed.reload import HALF_PRECISION_TOLERANCE, TOLERANCE, ask_client

__all__ = ["verify"]

CLIENT = "transformers"
AGAIN = "export the model again"
LEAVE = "leave out the layers that it speaks of, or export with --format safetensors"
# A model may have parameters of its own whose names end in _scale.
SCALE = re.compile(r"(.*\.)?(weight|input|output|q|k|v)_(global_)?scale")


def verify(path: Path, record: ExportRecord | None) -> Verification:
    """Check the files, decode every weight with the library, then load and run in a fresh process.

    Args:
        path: The checkpoint.
        record: What our export recorded; ``None`` for another tool's checkpoint, of which only
            structure, finiteness and loading can be judged.
    """
    findings: list[Finding] = []
    checks: list[str] = []
    config = _config(path)
    tensors, unreadable = _load(path)
    findings += unreadable
    findings += _scales(tensors)
    if record is not None:
        found = {name: checksum(tensor) for name, tensor in tensors.items()}
        findings += compare_checksums(record, found)
        if not findings:
            findings += _decoded(tensors, config, record)
            checks.append(
                f"{len(record.weights)} weights decode to what was simulated, bit for bit"
            )
    else:
        checks.append("no bittern.json: structure and loading only")
    perplexity = None
    probe = record.probe if record is not None else None
    if not findings:  # damaged files need no client to be condemned
        answer = _ask(path, probe)
        if "error" in answer:
            findings.append(Finding("checkpoint", f"transformers fails: {answer['error']}", LEAVE))
        else:
            findings += _loading(answer)
            version = answer["transformers"]
            checks.append(
                f"transformers {version} in a fresh process: no key missing or unexpected"
            )
            if probe is not None and answer["nll"] is not None:
                perplexity, verdict, text = _compare(probe, answer["nll"])
                findings += verdict
                checks.append(text)
    return Verification(
        ok=not findings,
        path=str(path),
        client=CLIENT,
        findings=tuple(findings),
        checks=tuple(checks) if not findings else (),
        perplexity=perplexity,
        reference_perplexity=probe.perplexity if probe is not None else None,
    )


def _config(path: Path) -> QuantizationConfig:
    file = path / "config.json"
    try:
        data = read_json(file, error=VerificationError, strict=False)["quantization_config"]
        return QuantizationConfig(**data)
    except (ValueError, LookupError, TypeError, AttributeError, NotImplementedError) as error:
        raise VerificationError(
            f"no usable quantization_config: {type(error).__name__}: {error}",
            where=str(file),
            hint=AGAIN,
        ) from error


def _load(path: Path) -> tuple[dict[str, Tensor], list[Finding]]:
    tensors: dict[str, Tensor] = {}
    findings = []
    files = sorted(path.glob("*.safetensors"))
    if not files:
        findings.append(Finding("*.safetensors", "there is none", AGAIN))
    for file in files:
        try:
            tensors |= load_tensors(file, error=VerificationError)
        except VerificationError as error:
            findings.append(Finding(file.name, error.what, AGAIN))
    return tensors, findings


def _scales(tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    for name, tensor in tensors.items():
        if SCALE.fullmatch(name) and tensor.is_floating_point():
            values = tensor.float()
            if not bool(torch.isfinite(values).all()):
                yield Finding(name, "holds NaN or Inf", AGAIN)
            elif not bool((values > 0).all()):
                yield Finding(name, "holds a scale that is not positive", AGAIN)


def _decoded(
    tensors: Mapping[str, Tensor], config: QuantizationConfig, record: ExportRecord
) -> Iterator[Finding]:
    """Decode every weight with the library's own decompressor and compare with the simulation."""
    for name, value in record.weights.items():
        path = name.removesuffix(".weight")
        local = {
            key.removeprefix(f"{path}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{path}.") and "." not in key.removeprefix(f"{path}.")
        }
        scheme = _scheme_for(path, config)
        if scheme is None or scheme.format is None:
            yield Finding(path, "no group of quantization_config targets it", AGAIN)
            continue
        decompressor = BaseCompressor.get_value_from_registry(str(scheme.format))
        try:
            decoded = decompressor.decompress(local, scheme)["weight"]
        except Exception as error:  # the library raises many kinds for tensors that do not fit
            yield Finding(name, f"does not decode: {error}", AGAIN)
            continue
        if checksum(decoded.float()) != value:
            yield Finding(name, "decodes to other values than were simulated", AGAIN)


def _scheme_for(path: str, config: QuantizationConfig) -> QuantizationScheme | None:
    schemes = [s for s in config.config_groups.values() if isinstance(s, QuantizationScheme)]
    for scheme in schemes:
        if any(match_name(path, target) for target in scheme.targets):
            return scheme
    ignored = any(match_name(path, target) for target in config.ignore or ())
    classes = {"Linear", "Embedding"}
    by_class = [s for s in schemes if classes & set(s.targets)]
    return by_class[0] if by_class and not ignored else None


def _ask(path: Path, probe: Probe | None) -> dict[str, Any]:
    if probe is None:
        return ask_client(path, None)
    return ask_client(path, probe.input_ids, dtype=probe.dtype)


def _loading(answer: Mapping[str, Any]) -> Iterator[Finding]:
    problems = {
        "missing": "transformers misses it and would use random values",
        "unexpected": "transformers does not know it and ignores it",
        "mismatched": "has another shape than transformers expects",
    }
    for kind, problem in problems.items():
        for name in answer[kind]:
            yield Finding(name, problem, AGAIN)
    if not answer["quantized"]:
        yield Finding(
            "config.json",
            "transformers does not see a quantized model",
            "check quantization_config",
        )


def _compare(probe: Probe, nll: list[list[float]]) -> tuple[float, list[Finding], str]:
    ours = torch.tensor(probe.nll, dtype=torch.float64)
    theirs = torch.tensor(nll, dtype=torch.float64)
    mean = float(theirs.mean())
    perplexity = math.exp(min(mean, 700.0))
    relative = abs(perplexity / probe.perplexity - 1)
    worst = float((ours - theirs).abs().max())
    text = (
        f"perplexity on the probe {perplexity:.4f}, in memory {probe.perplexity:.4f} "
        f"({relative:.4%} apart, largest loss difference {worst:.2g} nats)"
    )
    allowed = TOLERANCE if probe.dtype == "float32" else HALF_PRECISION_TOLERANCE
    if math.isfinite(relative) and relative <= allowed:
        return perplexity, [], text
    finding = Finding(
        "perplexity",
        f"{perplexity:.4f} in transformers, {probe.perplexity:.4f} in memory",
        "the checkpoint computes something else than the model; report it",
    )
    return perplexity, [finding], text
