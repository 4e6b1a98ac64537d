"""Saves and loads through ``megatron.core.dist_checkpointing``, at any number of ranks.

Tensors go into safetensors; no pickle is written, none is read. Checkpoints that users make by
Megatron's own strategies hold pickles: see `entries_to_load`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from bittern.errors import CheckpointError
from bittern.nn import named_quant_modules
from bittern.records import CheckpointIO
from bittern_megatron.adapter import unwrapped
from bittern_megatron.files import METADATA, NoCommon, SafetensorsLoad, SafetensorsSave, index_of
from bittern_megatron.index import check_index
from bittern_megatron.linear import ParallelLinear
from bittern_megatron.state import NAMES, WANTED, Wanted

__all__ = ["FOLDER", "entries_to_load", "load", "make_io", "save"]

FOLDER = "megatron"
QUANTIZERS = "bittern.quantizers/"  # how core begins the names of what quantizers found out


def make_io(model: nn.Module, path: Path) -> CheckpointIO | None:
    """Return how a model is saved to ``path``, or restored from it.

    ``None`` if it is none of Megatron's, runs in a process without groups, or core's own
    safetensors are at ``path``.
    """
    inner, _ = unwrapped(model)
    if inner is None or not dist.is_initialized() or not parallel_state.is_initialized():
        return None
    if (path / "manifest.json").is_file() and not (path / FOLDER).is_dir():
        return None
    return CheckpointIO(name="megatron", save=save, load=load)


def save(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the model and what its quantizers found out; every rank calls this.

    Args:
        model: The model, or what wraps it.
        tensors: What the quantizers found out on this rank, by name. That of Megatron's parallel
            layers is taken from the layers, which know how it is split.
        path: The directory, the same one on all ranks.

    Raises:
        CheckpointError: The model keeps something that is no tensor, or the ranks do not name one
            directory.
    """
    inner, prefix = _inner(model)
    _check_same(path)
    sharded = _entries(model, METADATA)
    sharded |= _others(tensors, _parallel(inner), prefix)
    folder = path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(sharded, str(folder), sharded_strategy=SafetensorsSave())
    if dist.get_rank() == 0:  # Megatron pickles what is no tensor, here an empty dictionary
        (folder / "common.pt").unlink(missing_ok=True)
    dist.barrier()


def load(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], Callable[[], object]]:
    """Read what a converted model is filled with; every rank calls this.

    Args:
        model: The converted model, or what wraps it.
        path: What `save` wrote.

    Returns:
        What the quantizers found out, this rank's slices of it, by the names that `save` got; and
        a function that fills the weights.

    Raises:
        CheckpointError: The checkpoint is damaged, or is that of another model.
    """
    inner, prefix = _inner(model)
    folder = path / FOLDER
    wanted = _fitting(model, index_of(folder), METADATA, where=str(folder))
    try:
        found = dist_checkpointing.load(
            wanted,
            str(folder),
            sharded_strategy=SafetensorsLoad(),
            common_strategy=NoCommon(),
        )
    except (Exception, CheckpointException) as error:  # what is damaged can fail anywhere
        raise CheckpointError(f"it cannot be loaded: {error}", where=str(folder)) from error
    names = _names(inner)
    ours = [key for key in found if key in names or key.startswith(QUANTIZERS)]
    quantizers = {_put_before(names.get(key, key), prefix=prefix): found.pop(key) for key in ours}
    return quantizers, partial(inner.load_state_dict, found)


def entries_to_load(
    model: nn.Module, folder: Path, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the sharded state dict that loads a checkpoint of Megatron's own into a model.

    It is `sharded_state_dict` with two differences. There are entries for all that the checkpoint
    holds of the model's quantizers, calibrated or not. And they have memory of their own, so that
    a load that fails leaves the model as it was.

    The index of such a checkpoint is a pickle. It is read only after `check_index` has seen that
    it makes nothing but an index.

    Args:
        model: The converted model, or what wraps it.
        folder: What ``dist_checkpointing.save`` wrote by its strategy ``torch_dist``.
        metadata: What ``sharded_state_dict`` was given when it was saved.

    Raises:
        CheckpointError: The model keeps something that is no tensor, or the checkpoint does not
            fit it, or is damaged.
    """
    check_index(folder)
    try:
        index = dist_checkpointing.load_tensors_metadata(str(folder))
    except (Exception, CheckpointException) as error:  # what is damaged can fail anywhere
        raise CheckpointError(f"it cannot be read: {error}", where=str(folder)) from error
    return _fitting(model, index, metadata or {}, where=str(folder))


def _fitting(
    model: nn.Module,
    index: Mapping[str, ShardedTensor],
    metadata: Mapping[str, Any],
    *,
    where: str,
) -> dict[str, Any]:
    """Return the entries of a model that an index has, with memory of their own."""
    entries = _entries(model, {**metadata, WANTED: True})
    found = {key: _to_load(value, index) for key, value in entries.items()}
    found = {key: value for key, value in found.items() if value is not None}
    _check_fit(found, index, where=where)
    return found | {name: replace(index[name]) for name in index if name.startswith(QUANTIZERS)}


def _entries(model: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's own entries, without objects that hold nothing.

    Raises:
        CheckpointError: The model keeps something that is no tensor.
    """
    inner, _ = _inner(model)
    sharded = inner.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(dict(metadata)))
    return {key: value for key, value in sharded.items() if not _is_empty(key, value)}


def _inner(model: nn.Module) -> tuple[Any, str]:
    inner, prefix = unwrapped(model)
    if inner is None:
        raise CheckpointError(f"a {type(model).__qualname__} is no model of Megatron-Core")
    return inner, prefix


def _check_same(path: Path) -> None:
    """Raise on all ranks unless all of them write to one directory."""
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    own = crc32(str(path).encode())
    bounds = torch.tensor([own, -own], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if int(bounds[0]) != own or int(bounds[1]) != -own:
        raise CheckpointError(
            "the ranks were given different directories, and each would write a part",
            where=str(path),
            hint="give the same path on all ranks, on a file system that they share",
        )


def _is_empty(key: str, value: object) -> bool:
    """Whether an entry is an object that holds nothing, as the extra state of local layers.

    Raises:
        CheckpointError: It holds something, which only a pickle could store.
    """
    if not isinstance(value, ShardedObject):
        return False
    if value.data is not None:
        raise CheckpointError(
            f"it is a {type(value.data).__qualname__}, and only tensors are saved",
            where=key,
            hint="save it by Megatron's own means: model.sharded_state_dict() has the quantizers",
        )
    return True


def _to_load(value: Any, index: Mapping[str, ShardedTensor]) -> ShardedBase | None:
    """Return an entry with memory of its own: a load that fails leaves the model as it was."""
    if isinstance(value.data, Wanted):
        return value.data.found(value.key, index)
    return replace(value, data=torch.empty_like(value.data, device="cpu"))


def _check_fit(
    entries: Mapping[str, Any], index: Mapping[str, ShardedTensor], *, where: str
) -> None:
    problems: list[str] = []
    for value in entries.values():
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for item in nested_values([built]):
            stored = index.get(item.key)
            if stored is None:
                problems.append(f"{item.key} is missing")
            elif tuple(stored.global_shape) != tuple(item.global_shape):
                here, there = tuple(item.global_shape), tuple(stored.global_shape)
                problems.append(f"{item.key} is {here} here and {there} there")
    if problems:
        raise CheckpointError(
            f"it is the state of another model: {'; '.join(problems[:3])}",
            where=where,
            hint="restore into a model of the same architecture",
        )


def _others(
    tensors: Mapping[str, Tensor], parallel: tuple[str, ...], prefix: str
) -> dict[str, ShardedTensor]:
    """Return entries for the quantizers of layers that are the same on all tensor-parallel ranks.

    Raises:
        CheckpointError: The ranks hold different layers under one name.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    ranks = (0, parallel_state.get_tensor_model_parallel_rank(), get_pg_rank(group))
    found: dict[str, ShardedTensor] = {}
    for name, value in tensors.items():
        local = name.removeprefix(QUANTIZERS).removeprefix(prefix)
        if not local.replace("/", ".").startswith(parallel):
            key = f"{QUANTIZERS}{local}"
            found[key] = ShardedTensor.from_rank_offsets(key, value, replica_id=ranks)
    if found and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise CheckpointError(
            "a pipeline stage counts its layers from 0, so the name says not which layer it is",
            where=next(iter(found)),
            hint="quantize only parallel linear layers, or save with one pipeline stage",
        )
    return found


def _put_before(name: str, *, prefix: str) -> str:
    return f"{QUANTIZERS}{prefix}{name.removeprefix(QUANTIZERS)}"


def _parallel(inner: nn.Module) -> tuple[str, ...]:
    """Return where the slots of the parallel layers begin."""
    return tuple(
        f"{path}.{slot}." if path else f"{slot}."
        for path, layer in named_quant_modules(inner)
        if isinstance(layer, ParallelLinear)
        for slot in layer.slots()
    )


def _names(inner: nn.Module) -> dict[str, str]:
    """Return names in state dicts to core's, of all that quantizers of parallel layers may hold."""
    found: dict[str, str] = {}
    for path, layer in named_quant_modules(inner):
        if not isinstance(layer, ParallelLinear):
            continue
        prefix = f"{path}." if path else ""
        for slot, first in layer.slots().items():
            for depth, _ in enumerate(first.chain()):
                then = "then." * depth
                core = f"{QUANTIZERS}{prefix}{slot}{'.then' * depth}"
                found |= {
                    f"{prefix}{slot}_quantizer.{then}{name}": f"{core}/{name}" for name in NAMES
                }
    return found
