"""What quantizers found out, as entries of Megatron's sharded state dicts.

A tensor of a quantizer is split over the ranks as the tensor it is about: the scales per channel of
a weight along the weight's own axis. What belongs to all ranks is stored once.

Each layer's tensors have keys of their own. Megatron stacks the weights of all layers into one
tensor, but layers need not be quantized alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor

from bittern.errors import CheckpointError
from bittern.nn import TensorQuantizer
from bittern.records import QuantizerSpec
from bittern_megatron.shards import Shard, split_axis

if TYPE_CHECKING:
    from bittern_megatron.linear import ParallelLinear

__all__ = ["NAMES", "WANTED", "Wanted", "entries", "take"]

# A key of `metadata`, which reaches every layer: entries for whatever a checkpoint may hold.
WANTED = "bittern_wanted"
NAMES = (
    *("amax", "amin", "global_amax", "scale", "zero_point", "global_scale"),
    *("transforms.pre_scale", "transforms.matrix", "transforms.bias", "learned"),
)


@dataclass(frozen=True)
class Wanted:
    """A tensor that a checkpoint may hold, of a shape that only the checkpoint knows.

    Megatron carries it to its key in the checkpoint as the data of a factory.

    Attributes:
        name: Its name in `TensorQuantizer.state`.
        spec: The quantizer's spec.
        shard: How the quantized tensor is split, ``None`` where it is whole.
        ranks: This rank among those that hold the same tensor, and among their replicas.
    """

    name: str
    spec: QuantizerSpec
    shard: Shard | None
    ranks: tuple[int, int]

    def entry(self, key: str) -> ShardedTensorFactory:
        """Return the entry that stands for the tensor until `found` has looked for it."""
        return ShardedTensorFactory(key, self, _unbuilt, _unbuilt, (0, 0, 0))

    def found(self, key: str, index: Mapping[str, ShardedTensor]) -> ShardedBase | None:
        """Return the entry that loads the tensor, ``None`` if the checkpoint holds none.

        Args:
            key: Its key in the checkpoint.
            index: Every tensor of the checkpoint, by key.

        Raises:
            CheckpointError: It cannot be divided among this many ranks.
        """
        parts = self.shard.parts if self.shard is not None else 1
        stored = index.get(key, index.get(part_key(key, 0)))
        if stored is None:
            return None
        shape = list(stored.global_shape)
        axis = split_axis(self.name, len(shape), self.spec, self.shard)
        if axis is not None and self.shard is not None:
            if shape[axis] % self.shard.size:
                raise CheckpointError(
                    f"{tuple(shape)} cannot be divided among {self.shard.size} tensor-parallel "
                    "ranks",
                    where=key,
                    hint="load it with fewer ranks",
                )
            shape[axis] = shape[axis] // self.shard.size * parts
        value = torch.empty(shape, dtype=stored.dtype)
        return _entry(key, value, axis, self.shard, self.ranks)


def entries(
    layer: ParallelLinear,
    prefix: str,
    offsets: tuple[tuple[int, int, int], ...],
    metadata: Mapping[str, Any],
) -> dict[str, ShardedBase]:
    """Return the entries of a layer's quantizers, by name in the state dict.

    Args:
        layer: The converted layer.
        prefix: The prefix of its names.
        offsets: Which of several stacked layers or experts it is, as Megatron counts them.
        metadata: What Megatron hands to all layers.
    """
    ranks = (get_pg_rank(layer.tp_group), get_pg_rank(metadata.get("dp_cp_group")))
    which = "".join(f".{index}_of_{count}" for _, index, count in offsets)
    gated = prefix.endswith("linear_fc1.") and getattr(layer.config, "gated_linear_unit", False)
    found: dict[str, ShardedBase] = {}
    for slot, base, quantizer in _links(layer, prefix):
        shard = layer.shard(slot)
        if gated and shard is not None and slot != "input":
            shard = Shard(shard.axis, size=shard.size, rank=shard.rank, parts=2)
        state = quantizer.state()
        for name in NAMES if WANTED in metadata else state:
            key = f"{base}{name}"
            if WANTED in metadata:
                found[key] = Wanted(name, quantizer.spec, shard, ranks).entry(key + which)
                continue
            value = quantizer._parameters.get(name)  # its own identity tells optimizers who it is
            value = state[name] if value is None else value
            axis = split_axis(name, value.dim(), quantizer.spec, shard)
            found[key] = _entry(key + which, value, axis, shard, ranks)
    return found


def take(layer: ParallelLinear, state_dict: dict[str, Any], prefix: str) -> None:
    """Move what belongs to a layer's quantizers out of a state dict, into them.

    Args:
        layer: The converted layer.
        state_dict: Tensors by name; what is taken is removed.
        prefix: The prefix of the layer's names.
    """
    for _, base, quantizer in _links(layer, prefix):
        given = {name: state_dict[base + name] for name in NAMES if base + name in state_dict}
        if not given:
            continue
        # A range that is learned here is a parameter, which torch loads: optimizers know it.
        learned = quantizer.learned is not None and "learned" in given
        for name in given:
            if not (learned and name == "amax"):
                del state_dict[base + name]
        if not learned:
            device = layer.weight.device
            quantizer.load_state({name: value.to(device) for name, value in given.items()})


def _links(layer: ParallelLinear, prefix: str) -> Iterator[tuple[str, str, TensorQuantizer]]:
    """Yield slot, prefix of the names, and quantizer, down every chain."""
    for slot, first in layer.slots().items():
        for depth, quantizer in enumerate(first.chain()):
            yield slot, f"{prefix}{slot}_quantizer." + "then." * depth, quantizer


def _unbuilt(*_: object) -> Any:
    raise AssertionError("Wanted.found takes the place of the entry")


def part_key(key: str, part: int) -> str:
    """Return the key of one of the blocks that a slice is made of."""
    return f"{key}.part{part}"


def _entry(
    key: str, value: Tensor, axis: int | None, shard: Shard | None, ranks: tuple[int, int]
) -> ShardedBase:
    """Return the entry of a local tensor.

    Args:
        key: Its key in the checkpoint.
        value: The local tensor.
        axis: The axis that is split, ``None`` where every rank holds the whole tensor.
        shard: How it is split.
        ranks: Tensor-parallel rank, and rank among those that hold the very same.
    """
    if axis is None or shard is None:
        return ShardedTensor.from_rank_offsets(key, value, replica_id=(0, *ranks))
    replica = (0, 0, ranks[1])
    offset = (axis, shard.rank, shard.size)
    if shard.parts == 1:
        return ShardedTensor.from_rank_offsets(key, value, offset, replica_id=replica)

    def split(key: str, value: Tensor, replica: Any, flattened: object) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(part_key(key, i), part, offset, replica_id=replica)
            for i, part in enumerate(value.chunk(shard.parts, dim=axis))
        ]

    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=axis)

    return ShardedTensorFactory(key, value, split, merge, replica)
