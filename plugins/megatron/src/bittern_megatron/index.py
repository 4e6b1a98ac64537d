"""Looks at the index of a checkpoint before anybody unpickles it.

torch.distributed.checkpoint keeps its index in ``.metadata``, a pickle, and a pickle can name any
function to call. The opcodes are read here, none is executed, and whatever names something else
than the classes an index is made of is refused.
"""

from __future__ import annotations

import pickletools
from pathlib import Path

from bittern.errors import CheckpointError
from bittern.reading import read_bytes

__all__ = ["check_index"]

FILE = ".metadata"
LIMIT = 2**30  # bytes; each shard of a tensor takes about 300
CLASSES = frozenset(
    f"{module} {name}"
    for module, names in {
        "torch.distributed.checkpoint.metadata": (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("StorageMeta", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        ),
        "torch.distributed.checkpoint.planner": (
            *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "device"),
        "collections": ("OrderedDict",),
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),
    }.items()
    for name in names
)
STRINGS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})
PUTS = frozenset({"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"})
GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
# What calls by other ways than the names that are checked.
OTHERS = frozenset({"INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"})


def check_index(folder: Path) -> None:
    """Raise unless the index of a checkpoint makes nothing but an index.

    Args:
        folder: The directory that dist_checkpointing wrote.

    Raises:
        CheckpointError: It is missing, is no pickle, or names anything that no index needs.
    """
    file = folder / FILE
    hint = "give a directory that dist_checkpointing wrote by its strategy torch_dist"
    data = read_bytes(file, error=CheckpointError, limit=LIMIT, hint=hint)
    try:
        names = named_in(data)
    except ValueError as error:
        raise CheckpointError(f"the index is damaged: {error}", where=str(file)) from error
    strange = sorted(names - CLASSES - _dtypes())
    if strange:
        raise CheckpointError(
            f"the index would call {strange[0].replace(' ', '.')}, which no index needs: loading "
            "it could run code",
            where=str(file),
            hint="do not load this checkpoint by any means; get it again from its author",
        )


def named_in(data: bytes) -> set[str]:
    """Return what a pickle names, as ``"module name"``.

    Raises:
        ValueError: It is no whole pickle, or a name is put together by other means than two strings
            right before it is used, which no pickler does.
    """
    found: set[str] = set()
    memo: dict[int, str | None] = {}
    last: list[str | None] = [None, None]  # the two values that were pushed last, if strings
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL":
            found.add(str(argument))
        elif name == "STACK_GLOBAL":
            if last[0] is None or last[1] is None:
                raise ValueError("a name that is no plain text")
            found.add(f"{last[0]} {last[1]}")
        elif name in OTHERS:
            raise ValueError(f"the opcode {name}")
        if name in PUTS:
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = last[1]
        elif name in STRINGS:
            last = [last[1], str(argument)]
        elif name in GETS:
            last = [last[1], memo.get(int(argument))]
        elif name != "FRAME":
            last = [None, None]
    return found


def _dtypes() -> set[str]:
    import torch

    return {
        f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)
    }
