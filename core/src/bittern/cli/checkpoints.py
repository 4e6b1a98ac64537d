"""Reads what a directory holds: JSON files, and the headers of safetensors files.

No tensor is loaded, and torch only where there is a bittern.json or a manifest.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bittern.cli.states import modules_of_state, state_of
from bittern.errors import ModelError
from bittern.reading import TensorHeader, read_json, tensor_headers
from bittern.report.blocks import collapse

__all__ = ["describe"]

STATE, EXPORT = "bittern state", "bittern export"
QUANTIZED, PLAIN = "quantized checkpoint", "plain model"
PICKLED = (".bin", ".pt", ".pth")


def describe(path: Path) -> dict[str, Any]:
    """Return what ``path`` holds, as plain data.

    Raises:
        ModelError: It is no directory, holds no model, or a file is damaged.
        VerificationError: bittern.json is malformed or newer than this version.
        CheckpointError: manifest.json is.
    """
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "there is no such directory"
        raise ModelError(what, where=str(path), hint="give a model's directory")
    config = _config(path)
    quantization = config.get("quantization_config") if config is not None else None
    quantization = quantization if isinstance(quantization, dict) else None
    export = _export(path)
    state = state_of(path)
    files = sorted(path.rglob("*.safetensors"))
    headers = [header for file in files for header in tensor_headers(file, error=ModelError)]
    pickled = sorted(f.name for f in path.iterdir() if f.suffix in PICKLED)
    if config is None and export is None and state is None and not files:
        raise ModelError(
            "this directory holds no model",
            where=str(path),
            hint="look for one with config.json, manifest.json, bittern.json or *.safetensors",
        )
    formats = _scaled_weights(headers)
    kind = QUANTIZED if quantization is not None else PLAIN
    if export is not None:
        kind, formats = EXPORT, export[1]
    elif state is not None:
        kind, formats = STATE, _formats(modules_of_state(path))
    sizes: Counter[str] = Counter()
    for header in headers:
        sizes[header.dtype] += header.bytes
    return {
        "path": str(path),
        "kind": kind,
        "bittern": export[0] if export is not None else None,
        "state": state,
        "model": _model(config),
        "quantization": _quantization(quantization),
        "formats": formats,
        "tensors": _grouped(headers),
        "bytes_by_dtype": dict(sizes.most_common()),
        "bytes": sum(sizes.values()),
        "files": {str(f.relative_to(path)): f.stat().st_size for f in files},
        "pickled": pickled,
    }


def _config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json"
    if not file.exists() and not file.is_symlink():
        return None
    data = read_json(file, error=ModelError, strict=False)
    if not isinstance(data, dict):
        raise ModelError("is not a JSON object", where=str(file))
    return data


def _export(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Return the summary of bittern.json and the formats of the modules."""
    file = path / "bittern.json"
    if not file.exists() and not file.is_symlink():
        return None
    from bittern.exporting import ExportRecord

    record = ExportRecord.read(path)
    assert record is not None
    slots: dict[str, list[str]] = {}
    for entry in record.entries:
        text = f"{entry.get('slot')}: {entry.get('format')}/{entry.get('granularity')}"
        text += "/dynamic" if entry.get("dynamic") else ""
        slots.setdefault(str(entry.get("module", "")), []).append(text)
    summary = {
        "version": record.bittern,
        "schema": record.schema,
        "recipe": record.recipe,
        "format": record.format,
        "quantized_modules": len(slots),
        "skipped_modules": len(record.skipped),
        "tensors": len(record.tensors),
        "probe_rows": len(record.probe.input_ids) if record.probe is not None else 0,
        "probe_perplexity": record.probe.perplexity if record.probe is not None else None,
    }
    return summary, _formats((module or "(model)", tuple(text)) for module, text in slots.items())


def _formats(items: Iterable[tuple[str, tuple[str, ...]]]) -> list[dict[str, Any]]:
    return [
        {"modules": pattern, "count": count, "slots": list(slots)}
        for pattern, slots, count in collapse(items)
    ]


def _scaled_weights(headers: Iterable[TensorHeader]) -> list[dict[str, Any]]:
    """Return the modules whose weight has a scale beside it, as every quantized layout does."""
    dtypes = {header.name: header.dtype for header in headers}
    found: list[tuple[str, tuple[str, ...]]] = []
    for name in dtypes:
        module, _, tensor = name.rpartition(".")
        if tensor not in ("weight_scale", "weight_scale_inv", "scales"):
            continue
        weights = (f"{module}.{w}" for w in ("weight", "weight_packed", "qweight"))
        weight = next((w for w in weights if w in dtypes), None)
        if weight is not None:
            found.append((module, (f"weight: {dtypes[weight]}",)))
    return _formats(found)


def _grouped(headers: Iterable[TensorHeader]) -> list[dict[str, Any]]:
    groups = collapse((h.name, (h.dtype, h.shape, h.bytes)) for h in headers)
    return [
        {
            "tensors": pattern,
            "count": count,
            "dtype": dtype,
            "shape": list(shape),
            "bytes": size * count,
        }
        for pattern, (dtype, shape, size), count in groups
    ]


def _model(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if config is None:
        return None
    keys = ("architectures", "model_type", "dtype", "torch_dtype", "vocab_size")
    return {key: config[key] for key in keys if key in config}


def _quantization(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the gist of a ``quantization_config``, whoever wrote it."""
    if config is None:
        return None
    groups = config.get("config_groups")
    return {
        "method": config.get("quant_method"),
        "settings": {k: v for k, v in config.items() if isinstance(v, str | int | float | bool)},
        "groups": [
            {
                "targets": group.get("targets"),
                "weights": _scheme(group.get("weights")),
                "inputs": _scheme(group.get("input_activations")),
            }
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict)
        ],
        "ignored": config.get("ignore") or config.get("modules_to_not_convert") or [],
    }


def _scheme(scheme: Any) -> str | None:
    if not isinstance(scheme, dict):
        return None
    text = f"{scheme.get('type', '')}{scheme.get('num_bits', '')}/{scheme.get('strategy', '')}"
    size = scheme.get("group_size")
    text += f"[{size}]" if size else ""
    return text + ("/dynamic" if scheme.get("dynamic") else "")
