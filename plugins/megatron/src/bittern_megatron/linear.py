"""Quantized column and row parallel linear layers of Megatron-Core."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from bittern.errors import CheckpointError, ModelError
from bittern.nn import QuantModule
from bittern.nn.intercept import path_of
from bittern.nn.packed import PackedWeight
from bittern_megatron.shards import Shard
from bittern_megatron.state import entries, take

__all__ = ["ParallelLinear", "QuantColumnParallelLinear", "QuantRowParallelLinear"]


class ParallelLinear(QuantModule):
    """What both layers share: operands are quantized at the product, on every rank its slice.

    Slots ``weight``, ``input``, ``output``. ``input`` is what this rank multiplies, before the
    gathering of sequence parallelism, so every element is quantized once; ``output`` is the first
    item of what the layer returns, after its communication.
    """

    def shard(self, slot: str) -> Shard | None:
        """Return how the tensor of a slot is split over the ranks."""
        raise NotImplementedError

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output and the bias that the caller has to add, as the original does."""
        output, bias = super().forward(input_, *args, **kwargs)
        return self.quantize("output", output), bias

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the product of the quantized operands; Megatron's own forward calls this."""
        quantized = self.quantize("weight", weight)
        if quantized is not weight:
            # The fused kernel adds to the main_grad of the very tensor that is multiplied.
            kwargs["gradient_accumulation_fusion"] = False
        found: Tensor = super()._forward_impl(
            *args, input=self.quantize("input", input), weight=quantized, **kwargs
        )
        return found

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the layer's entries for dist_checkpointing, those of its quantizers included.

        Raises:
            CheckpointError: The weight is compressed.
        """
        if isinstance(self.weight, PackedWeight):
            raise CheckpointError(
                "its weight is compressed, and packed codes cannot be divided among other ranks",
                where=path_of(self),
                hint="save before bittern.compress, and compress what was restored",
            )
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        ours = tuple(f"{prefix}{slot}_quantizer." for slot in self.slots())
        own = {key: value for key, value in found.items() if not ours or not key.startswith(ours)}
        return own | entries(self, prefix, sharded_offsets, metadata or {})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        take(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _split(self, axis: int) -> Shard:
        return Shard(axis, size=get_pg_size(self.tp_group), rank=get_pg_rank(self.tp_group))


class QuantColumnParallelLinear(ParallelLinear, ColumnParallelLinear):
    """``Y_i = Q_in(X) @ Q_w(A_i)^T + b_i``: the weight ``(out, in)`` is split along its outputs."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``(sequence, batch, out)`` or this rank's slice of it, and the bias.

        Raises:
            ModelError: A weight is given that is not the layer's own, whose scales nobody knows.
        """
        if weight is not None and weight is not self.weight:
            raise ModelError(
                "it is called with a weight that is not its own",
                where=path_of(self),
                hint="leave the layer out of the recipe: skip it by its path",
            )
        return super().forward(input_, weight, runtime_gather_output)

    def shard(self, slot: str) -> Shard | None:
        """Return how the tensor of a slot is split over the ranks."""
        if slot == "weight":
            return self._split(0)
        return self._split(-1) if slot == "output" and not self.gather_output else None


class QuantRowParallelLinear(ParallelLinear, RowParallelLinear):
    """``Y = sum_i Q_in(X_i) @ Q_w(A_i)^T + b``: the weight is split along its inputs."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``(sequence, batch, out)``, summed over the ranks, and the bias."""
        return super().forward(input_)

    def shard(self, slot: str) -> Shard | None:
        """Return how the tensor of a slot is split over the ranks."""
        return {"weight": self._split(1), "input": self._split(-1)}.get(slot)
