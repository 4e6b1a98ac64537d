"""Damaged files by the hundred: every place of a JSON document, bits, lengths, headers, links."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Case = tuple[str, bytes]

# What may stand where something else is expected.
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63 - 1,
    1e308,
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "os:system",
    "a\x00b\x1b[31m\n",
    "é" * 300,
    [],
    [[]],
    {},
    {"x": {"x": 1}},
]


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value of a document, the document itself first."""
    yield path
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in items:
            yield from places(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy of a document after ``change(container, key)`` at a path."""
    found = copy.deepcopy(data)
    at = found
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return found


def json_damage(data: Any, odd: list[Any] = ODD) -> Iterator[tuple[str, Any]]:
    """Yield documents with one thing wrong: another value, one too few, one too many."""
    for path in places(data):
        if not path:
            yield from ((f"all = {value!r}", value) for value in odd)
            continue
        name = ".".join(map(str, path))
        for value in odd:
            yield (
                f"{name} = {value!r:.30}",
                replaced(data, path, lambda at, key, value=value: at.__setitem__(key, value)),
            )
        yield f"no {name}", replaced(data, path, lambda at, key: at.__delitem__(key))
        if isinstance(path[-1], str):
            yield (
                f"{name} misspelt",
                replaced(data, path, lambda at, key: at.__setitem__(f"{key}_", at.pop(key))),
            )
        else:
            yield f"{name} twice", replaced(data, path, lambda at, key: at.append(at[key]))


def text_damage(text: bytes) -> Iterator[Case]:
    """Yield what is no JSON, or JSON that we do not write."""
    nested = 100_000
    body = text.strip()
    key = body[1:].split(b":", 1)[0].strip()
    yield "empty", b""
    yield "blank", b" \n" * 100
    yield "byte order mark", b"\xef\xbb\xbf" + text
    yield "utf-16", text.decode().encode("utf-16")
    yield "not utf-8", text.replace(b'"', b'"\xff', 1)
    yield "nul bytes", text + b"\x00" * 100
    yield "NaN", b'{"x": NaN, ' + body[1:]
    yield "Infinity", b'{"x": -Infinity, ' + body[1:]
    yield "too large a number", b'{"x": 1e999, ' + body[1:]
    yield "too long an integer", b'{"x": ' + b"9" * 5000 + b", " + body[1:]
    yield "a key twice", b"{" + key + b": 1, " + body[1:]
    yield "half a surrogate", b'{"x": "\\ud800", ' + body[1:]
    yield "deep lists", b"[" * nested + b"]" * nested
    yield "deep objects", b'{"x":' * nested + b"1" + b"}" * nested
    yield "deep inside", b'{"x":' + b"[" * nested + b"]" * nested + b", " + body[1:]
    yield "two documents", text + text
    yield "a comment", b"// ours\n" + text
    yield "a pickle", pickle.dumps({"x": print})
    yield "a zip file", b"PK\x03\x04" + bytes(200)


def byte_damage(data: bytes, count: int, seed: int = 0) -> Iterator[Case]:
    """Yield a file cut off, with a bit flipped, with bytes lost, doubled or overwritten."""
    chance = random.Random(seed)
    for _ in range(count):
        at, kind = chance.randrange(len(data)), chance.randrange(10)
        if kind < 6:
            bit = 1 << chance.randrange(8)
            yield f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        elif kind == 6:
            yield f"cut off at {at}", data[:at]
        elif kind == 7:
            length = chance.randrange(1, 64)
            yield f"{length} bytes lost at {at}", data[:at] + data[at + length :]
        elif kind == 8:
            yield f"doubled at {at}", data[:at] + data[at : at + 40] + data[at:]
        else:
            noise = chance.randbytes(16)
            yield f"overwritten at {at}", data[:at] + noise + data[at + 16 :]


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    """Undo `parts`."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def header_damage(data: bytes) -> Iterator[Case]:
    """Yield safetensors files whose header lies."""
    header, body = parts(data)
    size = len(data)
    for claim in (0, 1, 2, 7, size - 9, size - 8, size - 7, size, 2**31, 2**60, 2**63, 2**64 - 1):
        yield f"a header of {claim} bytes", struct.pack("<Q", claim) + data[8:]
    names = [name for name in header if name != "__metadata__"]
    odd = [*ODD, [-1, 4], [0, 2**60], [2**60, 2**61], [4, 0], [0, 2**64 - 1], "F32", "F64", "BF16"]
    odd += ["I64", "U8", "F8_E4M3", "C64", "F4", "Q9"]
    for label, changed in json_damage({name: header[name] for name in names[:3]}, odd):
        whole = {**header, **changed} if isinstance(changed, dict) else changed
        if isinstance(changed, dict):
            whole = {k: v for k, v in whole.items() if k not in names[:3] or k in changed}
        if whole != header:
            yield label, joined(whole, body)
    alike: dict[str, str] = {}  # two tensors that only their names tell apart
    for name in names:
        kind = json.dumps([header[name]["dtype"], header[name]["shape"]])
        if kind in alike:
            first, second = alike[kind], name
        alike[kind] = name
    swapped = {**header, first: header[second], second: header[first]}
    yield "two tensors swapped", joined(swapped, body)
    yield "offsets overlap", joined({**header, first: header[second]}, body)
    yield "a tensor more", joined({**header, "more": header[first]}, body)
    yield (
        "an empty tensor more",
        joined({**header, "more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, body),
    )
    yield (
        "a shape that overflows",
        joined({**header, first: {**header[first], "shape": [2**32, 2**32, 2**32]}}, body),
    )
    yield "metadata that is none", joined({**header, "__metadata__": {"x": 1}}, body)
    yield "a name twice", data.replace(json.dumps(second).encode(), json.dumps(first).encode())
    yield "bytes more", data + bytes(64)


def put_link_out(file: Path) -> None:
    outside = file.parent.parent / "outside"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(outside)


def put_link(target: str) -> Callable[[Path], None]:
    def put(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return put


def put_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_socket(file: Path) -> None:
    file.unlink()
    before = Path.cwd()
    os.chdir(file.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file.name)
    finally:
        os.chdir(before)


def put_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").touch()


# What else can be where a file should be; the first of them leads out of the directory.
PLACES: dict[str, Callable[[Path], object]] = {
    "a link out of the directory": put_link_out,
    "a link to itself": lambda file: put_link(file.name)(file),
    "a link to nothing": put_link("nothing"),
    "a link to a device that never ends": put_link("/dev/zero"),
    "a link to the directory": put_link("."),
    "a pipe": put_fifo,
    "a socket": put_socket,
    "a directory": put_directory,
    "nothing": Path.unlink,
}
