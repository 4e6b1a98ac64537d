"""Tensors in shards: every process writes and reads its part, through torch's DCP.

The files are safetensors whose headers say where each shard belongs. DCP's own writer would put a
pickle beside them; that of the same package for safetensors does not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bittern.checkpoint.checksums import check_file, file_checksum
from bittern.checkpoint.manifest import SHARDS
from bittern.errors import CheckpointError
from bittern.reading import tensor_headers
from bittern.runtime.access import is_sharded
from bittern.runtime.ranks import agree, alone, is_first

__all__ = ["check_shards", "load_shards", "save_shards", "shard_shapes"]

Item = TypeVar("Item")


def save_shards(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, int]:
    """Write this rank's part of tensors; every rank calls this.

    Args:
        tensors: Name to tensor, a DTensor or the same on every rank; of the latter one rank writes
            each.
        folder: A directory that all ranks see; made where it is missing.

    Returns:
        The checksums of all files, by their path from the folder above.

    Raises:
        CheckpointError: A rank failed, or they do not see one directory.
    """
    with _explained(folder):
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer)
    problem: Exception | None = None
    checksums: dict[str, int] = {}
    try:
        if is_first():
            _check_whole(tensors, folder)
        checksums = {_name(file): file_checksum(file) for file in _mine(_files(folder))}
    except Exception as error:
        problem = error
    parts = agree(problem, checksums, failure=CheckpointError)
    return {name: value for part in parts for name, value in part.items()}


def check_shards(path: Path, checksums: Mapping[str, int], *, together: bool) -> None:
    """Raise unless the files are what was saved.

    Args:
        path: The directory above the folder of shards.
        checksums: What `save_shards` returned.
        together: Whether each rank looks at some of the files only, since all ranks are here.

    Raises:
        CheckpointError: A file changed, or is missing.
    """
    wanted = {name: value for name, value in checksums.items() if name.startswith(f"{SHARDS}/")}
    names = sorted(wanted)
    there = {_name(file) for file in _files(path / SHARDS)}
    if wanted and there != set(names):
        odd = min(there ^ set(names))
        raise CheckpointError(
            f"{odd} is missing" if odd in names else f"{odd} was not saved with it",
            where=str(path),
            hint="copy or download the whole directory again",
        )
    for name in _mine(names) if together else names:
        check_file(path / name, wanted[name])


def shard_shapes(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder of shards by name, without their values (meta tensors).

    Raises:
        CheckpointError: Files are damaged, or shards are missing.
    """
    files = _files(folder)
    if not files:
        raise CheckpointError(
            "there are no shards",
            where=str(folder),
            hint="copy or download the whole directory again",
        )
    for file in files:
        tensor_headers(file, error=CheckpointError, within=folder)
    with _explained(folder):
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    found: dict[str, Tensor] = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        parts = [(tuple(c.offsets), n) for c in entry.chunks if (n := math.prod(c.sizes))]
        if sum(n for _, n in parts) != math.prod(entry.size) or len(dict(parts)) != len(parts):
            raise CheckpointError(
                f"the shards of {name} are not one whole tensor: a file is missing, or of another "
                "save",
                where=str(folder),
                hint="copy or download the whole directory again",
            )
        found[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return found


def load_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors in place; each process reads what it holds of them.

    Args:
        tensors: Name to tensor of the shape it was saved with. With a DTensor among them every rank
            calls this.
        folder: What `save_shards` wrote, from any number of ranks.

    Raises:
        CheckpointError: The files cannot be read.
    """
    together = any(is_sharded(tensor) for tensor in tensors.values())
    with _explained(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not together,
        )


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _mine(items: list[Item]) -> list[Item]:
    """Return this rank's share of a list that all ranks have."""
    return items if alone() else items[dist.get_rank() :: dist.get_world_size()]


def _check_whole(tensors: Mapping[str, Tensor], folder: Path) -> None:
    found = shard_shapes(folder)
    for name, tensor in tensors.items():
        if name not in found or found[name].shape != tensor.shape:
            raise CheckpointError(
                f"not all shards of {name} were written",
                where=str(folder),
                hint="every rank has to write to one directory, on a shared file system",
            )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what DCP raises into one sentence; its own error is a BaseException."""
    try:
        yield
    except CheckpointException as error:
        failures: dict[int, Any] = dict(error.failures)
        rank = min(failures)
        problem = failures[rank][0]
        if isinstance(problem, KeyboardInterrupt):
            raise problem from None
        raise CheckpointError(
            f"rank {rank} failed: {type(problem).__name__}: {problem}", where=str(folder)
        ) from problem
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the shards cannot be written or read: {type(error).__name__}: {error}",
            where=str(folder),
            hint="copy or download the whole directory again; for a save, look at the file system",
        ) from error
