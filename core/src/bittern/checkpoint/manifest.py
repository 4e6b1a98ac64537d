"""manifest.json: what was done to a model, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from bittern.checkpoint.migrations import SCHEMA, migrated
from bittern.errors import CheckpointError

__all__ = ["FILE", "Manifest", "ModeEntry"]

FILE = "manifest.json"
STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, kw_only=True)
class ModeEntry:
    """One mode of the stack, see `bittern.records.AppliedMode`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    plugin: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        schema: Version of this layout.
        bittern: Version of core that wrote it.
        plugins: Distribution to version of the plugins whose modes and rules were used.
        modes: What was done to the model, in order.
        io: Who wrote the tensors: ``"safetensors"`` is core, other names are a plugin's
            `CheckpointIO`.
        weights: Whether the model's own tensors are there too, or only the quantizers' state.
        aliases: Tensor name to the name of the tensor it shares storage with.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: int = SCHEMA
    bittern: str
    plugins: dict[str, str] = field(default_factory=dict)
    modes: list[ModeEntry] = field(default_factory=list)
    io: str = "safetensors"
    weights: bool = True
    aliases: dict[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write manifest.json."""
        text = json.dumps(asdict(self), indent=1)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read manifest.json, of this or any earlier schema.

        Raises:
            CheckpointError: It is missing, malformed, or newer than this version.
        """
        file = directory / FILE
        try:
            data = from_json(file.read_bytes(), allow_inf_nan=False)
        except OSError as error:
            raise CheckpointError(
                f"there is no {FILE}", where=str(directory), hint="give what bittern.save wrote"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"not JSON: {error}", where=str(file)) from error
        try:
            return _adapter().validate_json(to_json(migrated(data, where=str(file))))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"malformed: {place}: {first['msg']}", where=str(file)) from error


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)
