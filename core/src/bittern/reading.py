"""Reads files that anybody may have written: regular files only, of bounded size, strictly parsed.

A checkpoint comes from a disk that failed, a download that broke off, or somebody who means harm.
Everything read here ends in the content or in one error of the caller's kind: no pipe makes us
wait, no link leads out of the directory, and what parsing costs is known before it starts.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from bittern.errors import BitternError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TensorHeader",
    "load_tensors",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_text",
    "tensor_headers",
]

Error = type[BitternError]

MIB = 2**20
JSON_LIMIT = 64 * MIB
# Parsed, every mark of JSON costs at most 70 bytes: 280 MB for so many. A manifest of 100,000
# quantizers has 3 million.
JSON_MARKS = 4_000_000
HEADER_LIMIT = 100 * MIB  # of safetensors itself
# Each tensor of a header costs 1.5 kB once it is loaded, each text of its metadata 150 bytes.
HEADER_TENSORS = 250_000
HEADER_COMMAS = 3_000_000
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file, by its header.

    Attributes:
        name: Name in the file.
        dtype: The format's name of the dtype, ``"F8_E4M3"``.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        digits = re.search(r"\d+", self.dtype)
        bits = int(digits.group()) if digits is not None else 8  # BOOL
        return math.ceil(math.prod(self.shape) * bits / 8)


def read_bytes(
    path: Path, *, error: Error, limit: int, within: Path | None = None, hint: str | None = None
) -> bytes:
    """Return the bytes of a file.

    Args:
        path: The file.
        error: Kind of error to raise.
        limit: Largest size that is read.
        within: The directory that the file must be in, links resolved; any place by default.
        hint: What to do where there is no file.

    Raises:
        BitternError: Of the kind ``error``: missing, no regular file, too large, unreadable.
    """
    with _explained(path, error, hint), _opened(path, error, within) as (file, size):
        data = b"" if size > limit else file.read(limit + 1)
        if size > limit or len(data) > limit:
            raise error(
                f"is larger than the {limit / MIB:g} MiB that such a file may have",
                where=str(path),
            )
        return data


def read_text(
    path: Path, *, error: Error, limit: int, within: Path | None = None, hint: str | None = None
) -> str:
    """Return the text of a UTF-8 file, as `read_bytes` does."""
    data = read_bytes(path, error=error, limit=limit, within=within, hint=hint)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"not UTF-8: {problem}", where=str(path)) from problem


def read_json(
    path: Path,
    *,
    error: Error,
    limit: int = JSON_LIMIT,
    within: Path | None = None,
    hint: str | None = None,
    strict: bool = True,
) -> Any:
    """Return the data of a JSON file, see `read_bytes` and `parse_json`."""
    data = read_bytes(path, error=error, limit=limit, within=within, hint=hint)
    return parse_json(data, error=error, where=str(path), strict=strict)


def parse_json(data: bytes, *, error: Error, where: str, strict: bool = True) -> Any:
    """Return the data of a JSON text.

    Args:
        data: The text.
        error: Kind of error to raise.
        where: The file, for errors.
        strict: By the letter of RFC 8259, as we write it; other people's files hold NaN, Infinity
            and keys that are there twice.

    Raises:
        BitternError: Of the kind ``error``: no JSON or no UTF-8; half a surrogate pair; nested too
            deeply; or so many values that parsing would fill the memory. Where ``strict``: a key
            twice in one object; NaN, Infinity or a number that becomes it; an integer of more than
            64 bits.
    """
    if sum(data.count(mark) for mark in (b"{", b"[", b",", b":")) > JSON_MARKS:
        raise error("holds more values than such a file can have", where=where)
    try:
        text = data.decode("utf-8")
        found = json.loads(text, **(_STRICT if strict else {}))
        if _LONE_SURROGATE.search(text) is not None:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"not UTF-8: {problem}", where=where) from problem
    except UnicodeEncodeError as problem:
        raise error("malformed: half a surrogate pair", where=where) from problem
    except ValueError as problem:
        raise error(f"not JSON: {problem}", where=where) from problem
    except RecursionError as problem:
        raise error("not JSON that we read: nested too deeply", where=where) from problem
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"the integer {text[:24]}… has more than 64 bits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is too large")
    return value


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _object,
    "parse_constant": _constant,
    "parse_int": _integer,
    "parse_float": _float,
}


def load_tensors(path: Path, *, error: Error, within: Path | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU, mapped into memory.

    Args:
        path: The file.
        error: Kind of error to raise.
        within: The directory that the file must be in; any place by default.

    Raises:
        BitternError: Of the kind ``error``: missing, no regular file, damaged.
    """
    from safetensors import safe_open

    with _tensors_explained(path, error):
        _check_header(path, error, within)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def tensor_headers(path: Path, *, error: Error, within: Path | None = None) -> list[TensorHeader]:
    """Return what a safetensors file holds, without loading it or torch.

    Raises:
        BitternError: Of the kind ``error``: missing, no regular file, damaged.
    """
    from safetensors import safe_open

    found: list[TensorHeader] = []
    with _tensors_explained(path, error):
        _check_header(path, error, within)
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                found.append(TensorHeader(name, str(part.get_dtype()), shape))
    return found


def _check_header(path: Path, error: Error, within: Path | None) -> None:
    """Refuse what safetensors would read at a cost that the file's size does not show."""
    with _opened(path, error, within) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise error(
                f"cannot be read: it has {size} bytes and says that its header has {length}",
                where=str(path),
                hint=_AGAIN,
            )
        header = file.read(length)
    if header.count(b"{") > HEADER_TENSORS or header.count(b",") > HEADER_COMMAS:
        raise error("holds more tensors than a model has", where=str(path))


@contextmanager
def _tensors_explained(path: Path, error: Error) -> Iterator[None]:
    with _explained(path, error, None):
        try:
            yield
        except (OSError, BitternError):
            raise
        except Exception as problem:  # of several kinds: dtypes and sizes that torch does not have
            raise error(f"cannot be read: {problem}", where=str(path), hint=_AGAIN) from problem


@contextmanager
def _opened(path: Path, error: Error, within: Path | None) -> Iterator[tuple[BinaryIO, int]]:
    """Yield a regular file, open, and its size; never wait for the other end of a pipe."""
    _check_regular(path, path.stat(), error)  # before opening, which may wait, or rewind a tape
    _check_place(path, within, error)
    with os.fdopen(os.open(path, _FLAGS), "rb") as file:
        found = os.fstat(file.fileno())
        _check_regular(path, found, error)
        yield file, found.st_size


@contextmanager
def _explained(path: Path, error: Error, hint: str | None) -> Iterator[None]:
    """Turn what the file system says into one sentence."""
    try:
        yield
    except FileNotFoundError as problem:
        raise error("there is no such file", where=str(path), hint=hint) from problem
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        why = getattr(problem, "strerror", None) or problem
        raise error(f"cannot be read: {why}", where=str(path)) from problem


def _check_regular(path: Path, found: os.stat_result, error: Error) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise error(f"is {what}, not a file", where=str(path))


def _check_place(path: Path, within: Path | None, error: Error) -> None:
    """Refuse links out of a directory, but for those that the cache of a model hub is made of."""
    if within is None:
        return
    directory = within.resolve()
    target = path.resolve()
    if target.is_relative_to(directory):
        return
    # snapshots/REVISION/file -> blobs/HASH, both below the directory of one model
    caches = [p.parent for p in (directory, *directory.parents) if p.name == "snapshots"]
    if not any(target.parent == cache / "blobs" for cache in caches):
        raise error(
            f"is a link out of its directory, to {target}",
            where=str(path),
            hint="put the file itself there, if you trust it",
        )
