"""A directory in which a long calibration keeps what is done, part by part.

    run.json                 what is calibrated: model, plan, data, versions
    part-0003.safetensors    what the fourth part's steps changed and noted: tensors, ranges
    after-0003.safetensors   what its blocks returned, with which the next part goes on

Every file is written beside and renamed, ``part`` before ``after``. So a run that is killed at any
point goes on behind the last part that has both. Of ``after`` the last two are kept: a rank may
have been killed one part before the others.
"""

from __future__ import annotations

import difflib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bittern.errors import CalibrationError
from bittern.reading import load_tensors, read_json
from bittern.runtime.files import write_beside
from bittern.runtime.ondisk import Place

__all__ = ["WorkDir", "read_changes"]

_ABOUT = "run.json"
_TREE = "tree"  # what the tensors of a file hang on, as JSON


class WorkDir:
    """What is done of a calibration.

    Args:
        path: The directory; it is made if need be.
        about: What is calibrated, as plain data. A directory that was begun with something else is
            refused.

    Raises:
        CalibrationError: It belongs to another calibration, or another process works in it.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CalibrationError(
                f"the work directory cannot be made: {error.strerror}", where=str(path)
            ) from error
        known = path / _ABOUT
        if known.exists():
            self._check(read_json(known, error=CalibrationError), json.loads(_text(about)))
        else:
            _write(known, lambda stage: stage.write_text(_text(about)))

    @contextmanager
    def locked(self) -> Iterator[WorkDir]:
        """Keep other processes out meanwhile.

        Raises:
            CalibrationError: One is at work.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CalibrationError(
                    "another process works in this directory",
                    where=str(self.path),
                    hint="wait for it, or choose another work directory",
                ) from error
            yield self

    def done(self) -> int:
        """Return how many parts are done."""
        found = [int(p.stem.removeprefix("after-")) for p in self.path.glob("after-*.safetensors")]
        return max(found, default=-1) + 1

    def keep(self, index: int, changes: Mapping[str, Tensor], notes: Any, after: Any) -> Any:
        """Keep what a part's steps changed and what comes after it; return ``after`` from the disk.

        Args:
            index: Number of the part.
            changes: Tensors by name.
            notes: What the steps noted for the report, as plain values.
            after: Tensors and plain values in dicts, lists and tuples.
        """
        _save(self._part(index), {"changes": dict(changes), "notes": notes})
        _save(self._after(index), after)
        for old in self.path.glob("after-*.safetensors"):
            if old.name < self._after(index - 1).name:  # another rank may be one part behind
                old.unlink()
        return self.after(index)

    def changes(self, index: int) -> dict[str, Tensor]:
        """Return what a part's steps changed."""
        return read_changes(self._part(index))

    def notes(self, index: int) -> Any:
        """Return what a part's steps noted for the report."""
        return _load(self._part(index))["notes"]

    def places(self, index: int) -> dict[str, Place]:
        """Return where the changed tensors of a part lie."""
        path = self._part(index)
        with safe_open(path, framework="pt") as file:
            tree = json.loads(bytes(file.get_tensor(_TREE).numpy()))
        (_, changed), *_ = tree["dict"]
        return {name: Place(path, item["tensor"]) for name, item in changed["dict"]}

    def after(self, index: int) -> Any:
        """Return what comes after a part; the tensors lie on the disk, mapped into memory."""
        return _load(self._after(index))

    def _part(self, index: int) -> Path:
        return self.path / f"part-{index:04}.safetensors"

    def _after(self, index: int) -> Path:
        return self.path / f"after-{index:04}.safetensors"

    def _check(self, known: Any, about: Mapping[str, Any]) -> None:
        if known == about:
            return
        lines = difflib.unified_diff(
            _text(known).splitlines(), _text(about).splitlines(), "begun with", "now", n=0
        )
        changes = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        more = f" and {len(changes) - 8} more" if len(changes) > 8 else ""
        raise CalibrationError(
            f"it was begun with something else: {'; '.join(changes[:8])}{more}",
            where=str(self.path),
            hint="choose another work directory, or remove this one to begin anew",
        )


def read_changes(path: Path) -> dict[str, Tensor]:
    """Return what a part's steps changed.

    Args:
        path: A file ``part-0003.safetensors``.
    """
    found: dict[str, Tensor] = _load(path)["changes"]
    return found


def _text(about: Any) -> str:
    return json.dumps(about, indent=1, sort_keys=True, default=str)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of the directory."""
    try:
        write_beside(path, write)
    except OSError as error:
        raise CalibrationError(
            f"{path.name} cannot be written: {error.strerror}",
            where=str(path.parent),
            hint="make room, and start again: what is done is kept",
        ) from error


def _save(path: Path, value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_packed(value, tensors, path.stem)).encode()
    tensors[_TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    _write(path, lambda stage: save_file(tensors, stage))


def _load(path: Path) -> Any:
    tensors = load_tensors(path, error=CalibrationError)
    return _unpacked(json.loads(bytes(tensors[_TREE].numpy())), tensors)


def _packed(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Return a value as JSON, with its tensors by number."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "device": str(value.device)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {"dict": [[k, _packed(v, tensors, where)] for k, v in value.items()]}
    if type(value) in (tuple, list):
        items = [_packed(item, tensors, where) for item in value]
        return {type(value).__name__: items}
    raise CalibrationError(
        f"a block returns a {type(value).__name__}, which cannot be kept in a work directory",
        where=where,
        hint="quantize without a work directory",
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].to(value["device"])
    if "dict" in value:
        return {k: _unpacked(v, tensors) for k, v in value["dict"]}
    (kind,) = value
    items = [_unpacked(item, tensors) for item in value[kind]]
    return tuple(items) if kind == "tuple" else items
