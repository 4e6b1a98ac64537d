"""Strategies of dist_checkpointing that write and read safetensors.

Megatron's own keep an index that is a pickle. A safetensors file says in its header, which is JSON,
where in the whole tensors its slices belong; torch.distributed.checkpoint writes and reads them. A
file holds one slice of a tensor, so state dicts have to be made with `METADATA`.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
    SaveShardedStrategy,
)
from megatron.core.dist_checkpointing.strategies.torch import mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from bittern.checkpoint.sharded import shard_shapes

__all__ = ["METADATA", "NoCommon", "SafetensorsLoad", "SafetensorsSave", "index_of"]

# Megatron's word for: on every rank one slice of a tensor, which layers and halves do not share.
METADATA = {"singleton_local_shards": True}


def index_of(folder: Path) -> dict[str, ShardedTensor]:
    """Return the tensors of a checkpoint by key, whole, without their values.

    Raises:
        CheckpointError: There are none, files are damaged, or slices are missing.
    """
    return {
        key: ShardedTensor.from_rank_offsets(key, whole).without_data()
        for key, whole in shard_shapes(folder).items()
    }


class SafetensorsSave(SaveShardedStrategy):
    """Writes one file per rank, in this process."""

    def __init__(self) -> None:
        super().__init__("safetensors", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """There are none."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write the tensors that this rank is the first to hold."""
        dcp.save(
            mcore_to_pyt_state_dict(_by_key(sharded_state_dict, written=True)),
            storage_writer=HuggingFaceStorageWriter(str(checkpoint_dir), save_distributed=True),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )


class _AnyVersion:
    """What a strategy for one directory need not look at."""

    def check_backend_compatibility(self, loaded_version: object) -> None:
        """It is the one that was asked for."""

    def check_version_compatibility(self, loaded_version: object) -> None:
        """There is one."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """There are none."""
        return True


class SafetensorsLoad(_AnyVersion, LoadShardedStrategy):
    """Reads what `SafetensorsSave` wrote, from any number of ranks."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> Any:
        """Return the tensors in the place of their entries."""
        dcp.load(
            mcore_to_pyt_state_dict(_by_key(sharded_state_dict), True),
            storage_reader=HuggingFaceStorageReader(str(checkpoint_dir)),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )
        return dict_list_map_outplace(_value, sharded_state_dict)

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedTensor]:
        """Return the tensors by key, without their values."""
        return index_of(Path(checkpoint_dir))

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedTensor]:
        """Return the same: there are only tensors."""
        return index_of(Path(checkpoint_dir))

    def remove_sharded_tensors(self, checkpoint_dir: str, key_prefix: str) -> None:
        """Refuse: what was saved stays."""
        raise NotImplementedError("a saved state is not changed")


class NoCommon(_AnyVersion, LoadCommonStrategy):
    """Reads no common.pt, which is a pickle: nothing that is wanted is in it."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_sharded_objects(
        self, sharded_objects_state_dict: dict[str, Any], checkpoint_dir: str | Path
    ) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """Return nothing."""
        return {}


def _by_key(sharded_state_dict: dict[str, Any], *, written: bool = False) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for item in nested_values(sharded_state_dict):
        if not written or is_main_replica(item.replica_id):
            found[item.key].append(item)
    return found


def _value(item: ShardedTensor) -> Tensor:
    value: Tensor = item.data.view(item.local_shape)
    return value
