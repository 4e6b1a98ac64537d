"""Brings the statistics of several processes together (data-parallel calibration).

Every rank runs its own share of the data; the ranges are the largest over all ranks. A rank that
met an error says so before anybody waits for its numbers, so that all ranks stop, none hangs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bittern.errors import CalibrationError

__all__ = ["reduce_max"]


def reduce_max(values: Mapping[str, Tensor | None], error: str | None) -> dict[str, Tensor | None]:
    """Return the elementwise maximum over all ranks; in one process, the values themselves.

    Args:
        values: Quantizer name to amax; ``None`` where this rank saw no data.
        error: What went wrong on this rank, if anything did.

    Raises:
        CalibrationError: A rank met an error, or the ranks hold different modules or shapes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return dict(values)
    shapes = {k: None if v is None else tuple(v.shape) for k, v in values.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (error, shapes))
    failed = [(rank, text) for rank, (text, _) in enumerate(gathered) if text is not None]
    if failed:
        rank, text = failed[0]
        raise CalibrationError(f"rank {rank}: {text}", hint="every rank has stopped")
    common: dict[str, tuple[int, ...]] = {}
    for rank, (_, theirs) in enumerate(gathered):
        if list(theirs) != list(shapes):
            raise CalibrationError(
                f"rank {rank} holds other modules than rank {dist.get_rank()}",
                hint="data-parallel calibration needs the same model on every rank; for sharded "
                "models install the plugin of the framework that shards them",
            )
        for name, shape in theirs.items():
            if shape is not None and common.setdefault(name, shape) != shape:
                raise CalibrationError(
                    f"the ranks saw inputs with scales of shapes {common[name]} and {shape}",
                    where=name,
                    hint="use granularity: tensor, or rows of one length on every rank",
                )
    if not common:
        return dict(values)
    device = next((v.device for v in values.values() if v is not None), torch.device("cpu"))
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    parts: list[Tensor] = []
    for name, shape in common.items():
        value = values[name]
        value = torch.zeros(shape) if value is None else value  # amax is never negative
        parts.append(value.float().to(device).reshape(-1))
    flat = torch.cat(parts)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    pieces = torch.split(flat, [part.numel() for part in parts])
    reduced = {n: p.reshape(s) for (n, s), p in zip(common.items(), pieces, strict=True)}
    return {name: reduced.get(name) for name in values}
