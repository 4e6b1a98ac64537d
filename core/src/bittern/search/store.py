"""Scores in a file: a search that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from bittern.errors import OutputError, PlanError
from bittern.reading import read_text
from bittern.runtime import Fingerprint
from bittern.runtime.files import write_beside
from bittern.search.sensitivity import Sums

__all__ = ["ScoreFile", "fingerprint_of_batches", "fingerprint_of_model"]

LIMIT = 2**30  # bytes of a file
KIND = "bittern scores 1"


class ScoreFile:
    """What was measured so far, by candidate; on disk where there is a path.

    A candidate's sums are those of its first batches, so that it goes on with the next one. Python
    writes floating-point numbers so that they are read back bit for bit: a search that was killed
    ends with the same scores as one that was not.

    Args:
        path: The file, which need not be there; ``None`` keeps the scores in memory.
        signature: What the scores depend on, as plain data.

    Raises:
        PlanError: The file is of another search, and it says what differs; or it is no such file.
    """

    def __init__(self, path: Path | None, signature: Mapping[str, Any]) -> None:
        self._path = path
        self._signature = json.loads(json.dumps(signature))
        self._done: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._done = self._read(path)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(read_text(path, error=PlanError, limit=LIMIT))
            kind, theirs, done = data["kind"], data["signature"], data["done"]
            found = {
                str(name): {
                    "batches": int(state["batches"]),
                    "sums": {str(g): (float(s), float(c)) for g, (s, c) in state["sums"].items()},
                }
                for name, state in done.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                "it holds no scores of a search",
                where=str(path),
                hint="remove it, or name another file",
            ) from error
        ours = {"kind": KIND, **_flat(self._signature)}
        other = {"kind": kind, **_flat(theirs)}
        names = [n for n in {**ours, **other} if ours.get(n) != other.get(n)]
        if names:
            lines = [f"{n}: was {other.get(n)}, is {ours.get(n)}" for n in names]
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise PlanError(
                f"its scores are of another search ({'; '.join(lines[:5])}{more})",
                where=str(path),
                hint="remove it to begin anew, or name another file",
            )
        return found

    def batches(self, candidate: str) -> int:
        """Return how many batches a candidate has behind it."""
        found: int = self._done.get(candidate, {}).get("batches", 0)
        return found

    def sums(self, candidate: str) -> Sums:
        """Return what was measured of a candidate."""
        return dict(self._done.get(candidate, {}).get("sums", {}))

    def add(self, candidate: str, sums: Sums) -> None:
        """Add one batch to a candidate's sums, and write all of them.

        Raises:
            OutputError: The file cannot be written.
        """
        state = self._done.setdefault(candidate, {"batches": 0, "sums": {}})
        for group, (value, count) in sums.items():
            before, known = state["sums"].get(group, (0.0, 0.0))
            state["sums"][group] = (before + value, known + count)
        state["batches"] += 1
        if self._path is not None:
            self._write(self._path)

    def _write(self, path: Path) -> None:
        data = {"kind": KIND, "signature": self._signature, "done": self._done}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_beside(path, lambda stage: stage.write_text(json.dumps(data), encoding="utf-8"))
        except OSError as error:
            raise OutputError(
                f"the scores cannot be written: {error.strerror or error}", where=str(path)
            ) from error


def fingerprint_of_model(model: nn.Module) -> str:
    """Return a short name for all tensors of a model, by their names and numbers."""
    seen = Fingerprint()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        seen.update(name)
        seen.update(f"{tensor.dtype} {tuple(tensor.shape)}" if tensor.is_meta else tensor)
    seen.close()
    return seen.value


def fingerprint_of_batches(batches: Iterable[Any]) -> str:
    """Return a short name for batches."""
    seen = Fingerprint()
    for batch in batches:
        seen.update(batch)
    seen.close()
    return seen.value


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    """Return nested data as one level, for a comparison that says where things differ."""
    if not isinstance(data, Mapping):
        return {name: data}
    return {
        key: value
        for part, item in data.items()
        for key, value in _flat(item, f"{name}.{part}" if name else str(part)).items()
    }
