"""manifest.json: what was done to a model, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json

from bittern.checkpoint.checksums import data_checksum
from bittern.checkpoint.migrations import SCHEMA, migrated
from bittern.errors import CheckpointError
from bittern.exporting import left_aside
from bittern.reading import read_json

__all__ = ["DCP", "FILE", "SHARDS", "TENSORS", "Manifest", "ModeEntry"]

FILE = "manifest.json"
TENSORS = "state.safetensors"
DCP = "dcp"  # who writes tensors in shards
SHARDS = "shards"  # the folder of their files
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
        io: Who wrote the tensors: ``"safetensors"`` is core, ``"dcp"`` too, in shards; other names
            are a plugin's `CheckpointIO`.
        weights: Whether the model's own tensors are there too, or only the quantizers' state.
        aliases: Tensor name to the name of the tensor it shares storage with.
        checksums: Name of a file to its checksum, see `file_checksum`: of core's, and of what a
            plugin's `CheckpointIO` put beside manifest.json as safetensors.
        files: Names of the files that were written, manifest.json aside.
        checksum: That of all of the above, see `data_checksum`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: int = SCHEMA
    bittern: str
    plugins: dict[str, str] = field(default_factory=dict)
    modes: list[ModeEntry] = field(default_factory=list)
    io: str = "safetensors"
    weights: bool = True
    aliases: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=lambda: [TENSORS])
    checksum: int | None = None

    def write(self, directory: Path) -> None:
        """Write manifest.json."""
        data = asdict(self)
        del data["checksum"]
        data["checksum"] = data_checksum(data)
        text = json.dumps(data, indent=1)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read manifest.json, of this or any earlier schema.

        Raises:
            CheckpointError: It is missing, malformed, changed, or newer than this version.
        """
        file = directory / FILE
        if not file.is_symlink() and not file.exists():
            aside = left_aside(directory)
            raise CheckpointError(
                f"there is no {FILE}",
                where=str(directory),
                hint="give what bittern.save wrote"
                if aside is None
                else f"a save was killed while it replaced this; mv {aside} {directory}",
            )
        data = read_json(file, error=CheckpointError, within=directory)
        try:
            found = _adapter().validate_json(to_json(migrated(data, where=str(file))))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))[:200]
            raise CheckpointError(f"malformed: {place}: {first['msg']}", where=str(file)) from error
        except ValueError as error:  # nested deeper than the second parser likes
            raise CheckpointError(f"malformed: {error}", where=str(file)) from error
        rest = {name: value for name, value in data.items() if name != "checksum"}
        if found.checksum is not None and found.checksum != data_checksum(rest):
            raise CheckpointError(
                "changed since it was written",
                where=str(file),
                hint="copy or download the whole directory again; if you meant to change it, "
                "remove its last line, checksum",
            )
        return found


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)
