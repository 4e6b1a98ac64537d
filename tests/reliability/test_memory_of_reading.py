"""A file costs no more memory than twice its size and a constant, whatever it claims.

Each file is read in a process of its own, which says by how much its largest memory grew.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

resource = pytest.importorskip("resource")

MIB = 2**20
SIZE = 50 * MIB
CONSTANT = 320 * MIB  # see JSON_MARKS and HEADER_TENSORS in bittern.reading

CODE = """
import json, pathlib, resource, sys
import bittern.cli.checkpoints, bittern.checkpoint.restore, bittern.exporting.record
from bittern.checkpoint.manifest import Manifest
from bittern.cli.checkpoints import describe
from bittern.errors import BitternError, CheckpointError
from bittern.exporting import ExportRecord
from bittern.reading import load_tensors, tensor_headers
from bittern.config import parse_yaml, read_recipe_text

path = pathlib.Path(sys.argv[1])
def peak():
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

for read in (Manifest.read, ExportRecord.read, describe):  # what they import is no cost of a file
    try:
        read(path.parent / "nothing")
    except BitternError:
        pass
before = peak()
try:
    if path.name == "manifest.json":
        Manifest.read(path.parent)
    elif path.name == "bittern.json":
        ExportRecord.read(path.parent)
    elif path.name == "config.json":
        describe(path.parent)
    elif path.suffix == ".yaml":
        parse_yaml(read_recipe_text(path))
    else:
        tensor_headers(path, error=CheckpointError)
        load_tensors(path, error=CheckpointError)
    outcome = "read"
except BitternError as error:
    outcome = type(error).__name__
print(json.dumps([outcome, peak() - before]))
"""


def cost(file: Path) -> tuple[str, int]:
    """Return what reading ended in, and the memory that it took."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(file)], capture_output=True, text=True, check=True
    )
    outcome, used = json.loads(done.stdout)
    return outcome, used


def lists(file: Path) -> None:
    file.write_bytes(b"[" + b"[]," * (SIZE // 3) + b"[]]")


def objects(file: Path) -> None:
    file.write_bytes(b"[" + b'{"a":{}},' * (SIZE // 9) + b"{}]")


def one_text(file: Path) -> None:
    file.write_bytes(b'{"a": "' + b"x" * SIZE + b'"}')


def most_values(file: Path) -> None:
    """As many values as are parsed at all, each as costly as can be."""
    file.write_bytes(b"[" + b'{"":[0]},' * 999_000 + b"{}]")


def not_there(file: Path) -> None:
    """A terabyte that takes no room on the disk."""
    with file.open("wb") as sparse:
        sparse.truncate(2**40)


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ENTRY = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def many_tensors(file: Path) -> None:
    entries = b",".join(ENTRY % i for i in range(SIZE // 54))
    file.write_bytes(header(b"{" + entries + b"}"))


def most_tensors(file: Path) -> None:
    entries = b",".join(ENTRY % i for i in range(200_000))
    file.write_bytes(header(b"{" + entries + b"}"))


def much_metadata(file: Path) -> None:
    entries = b",".join(b'"%x":""' % i for i in range(SIZE // 11))
    file.write_bytes(header(b'{"__metadata__":{' + entries + b"}}"))


def sparse_header(file: Path) -> None:
    """A header of 100 MB in a file that claims to hold it."""
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", 2**40))
        sparse.truncate(2**41)


def one_mapping(file: Path) -> None:
    file.write_text("".join(f"k{i}: 1\n" for i in range(49_000)))


CASES: list[tuple[str, Callable[[Path], None]]] = [
    ("manifest.json", lists),
    ("manifest.json", objects),
    ("manifest.json", one_text),
    ("manifest.json", most_values),
    ("manifest.json", not_there),
    ("bittern.json", lists),
    ("config.json", lists),
    ("config.json", not_there),
    ("a.safetensors", many_tensors),
    ("a.safetensors", most_tensors),
    ("a.safetensors", much_metadata),
    ("a.safetensors", sparse_header),
    ("a.yaml", lists),
    ("a.yaml", one_mapping),
]
DEFAULT = {("manifest.json", "lists"), ("a.safetensors", "much_metadata")}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1].__name__}",
            marks=() if (case[0], case[1].__name__) in DEFAULT else pytest.mark.heavy,
        )
        for case in CASES
    ],
)
def test_memory_stays_in_proportion_to_the_file(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / name
    write(file)
    size = file.stat().st_blocks * 512
    outcome, used = cost(file)
    assert used < 2 * size + CONSTANT, f"{outcome}: {used / MIB:.0f} MiB of {size / MIB:.0f}"
    if write in (lists, objects, not_there, many_tensors, much_metadata, sparse_header):
        assert outcome.endswith("Error")
        assert used < size + 64 * MIB, f"{used / MIB:.0f} MiB: refused before it is parsed"
