"""bittern.json: what was written and what it must compute, so that anybody can verify it later.

It lies beside the tensors of every export: the plan, a checksum of every tensor in the files and
of every weight that was simulated, and a probe: token ids with the fake-quantized model's own
next-token losses. Its name does not end in ``.safetensors``: engines load everything that does.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json
from torch import Tensor

from bittern.errors import VerificationError
from bittern.reading import read_json
from bittern.records import Plan

__all__ = ["FILE", "ExportRecord", "Probe", "checksum", "checksums", "entry_dict"]

FILE = "bittern.json"
SCHEMA = 1
STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Probe:
    """Token ids and what the fake-quantized model made of them.

    Attributes:
        input_ids: Rows of token ids.
        nll: Next-token losses in nats, one row shorter than the ids.
        perplexity: ``exp`` of their mean.
        dtype: Name of the dtype in which the losses were computed, and a client should.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    input_ids: list[list[int]]
    nll: list[list[float]]
    perplexity: float
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """The content of bittern.json.

    Attributes:
        format: Name of the exporter.
        recipe: Name of the recipe.
        bittern: Version that wrote it.
        entries: The plan's entries as plain data.
        skipped: The plan's skipped modules.
        tensors: Tensor name in the files to checksum.
        weights: Parameter name to the checksum of its simulated float32 values.
        probe: What the model must compute, where it takes tokens.
        schema: Version of this layout.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: str
    recipe: str
    bittern: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    probe: Probe | None = None
    schema: int = SCHEMA

    def write(self, directory: Path) -> None:
        """Write bittern.json."""
        text = json.dumps(asdict(self), indent=1)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> ExportRecord | None:
        """Read bittern.json; ``None`` where there is none.

        Raises:
            VerificationError: It is malformed, or newer than this version.
        """
        file = directory / FILE
        if not file.is_symlink() and not file.exists():
            return None
        data = read_json(file, error=VerificationError, within=directory)
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise VerificationError(
                f"written by bittern {str(data.get('bittern'))[:40]}, which is newer than this one",
                where=str(file),
                hint="pip install -U bittern",
            )
        try:
            return _adapter().validate_json(to_json(data))  # strict mode takes no plain data
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))[:200]
            raise VerificationError(
                f"malformed: {place}: {first['msg']}",
                where=str(file),
                hint="export the model again",
            ) from error
        except ValueError as error:  # nested deeper than the second parser likes
            raise VerificationError(f"malformed: {error}", where=str(file)) from error


@cache
def _adapter() -> TypeAdapter[ExportRecord]:
    return TypeAdapter(ExportRecord)


def entry_dict(plan: Plan) -> list[dict[str, Any]]:
    """Return the plan's entries as plain data."""
    return [
        {
            "module": e.module,
            "slot": e.slot,
            "format": e.format,
            "granularity": str(e.granularity),
            "dynamic": e.spec.dynamic,
            "rule": e.rule,
            "plugin": e.plugin,
            "shape": list(e.shape) if e.shape is not None else None,
        }
        for e in plan.entries
    ]


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, dtype and shape."""
    whole = tensor.detach().to("cpu").contiguous()
    flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # stride 0: one element
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return zlib.crc32(flat.numpy().data, zlib.crc32(head))


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the checksum of every tensor."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}
