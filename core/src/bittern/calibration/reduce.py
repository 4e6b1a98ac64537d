"""Brings the statistics of several processes together (data-parallel calibration).

Every rank runs its own share of the data; the ranges are the largest over all ranks. A rank that
met an error says so wherever the others wait for it, so that all ranks stop, none hangs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bittern.errors import CalibrationError
from bittern.runtime import ranks

__all__ = ["RankError", "agree", "reduce_max", "reduce_sum"]


class RankError(CalibrationError):
    """What stopped one rank, or does not fit between them; it is raised on all of them."""


def agree(error: Exception | None = None, payload: Any = None) -> list[Any]:
    """Tell all ranks how this one fared; stop them all if one failed.

    Args:
        error: What went wrong on this rank, if anything did.
        payload: Plain data for the others.

    Returns:
        The payloads by rank.

    Raises:
        RankError: A rank failed, see `bittern.runtime.ranks.agree`. In one process, ``error``
            itself.
    """
    return ranks.agree(error, payload, failure=RankError)


def reduce_max(
    values: Mapping[str, Tensor | None], error: Exception | None
) -> dict[str, Tensor | None]:
    """Return the elementwise maximum over all ranks; in one process, the values themselves.

    Args:
        values: Quantizer name to amax; ``None`` where this rank saw no data.
        error: What went wrong on this rank, if anything did.

    Raises:
        RankError: A rank met an error, or the ranks hold different modules or shapes.
    """
    shapes = {k: None if v is None else tuple(v.shape) for k, v in values.items()}
    gathered = agree(error, shapes)
    if len(gathered) == 1:
        return dict(values)
    common: dict[str, tuple[int, ...]] = {}
    for rank, theirs in enumerate(gathered):
        if list(theirs) != list(shapes):
            raise RankError(
                f"rank {rank} holds other modules than rank {dist.get_rank()}",
                hint="data-parallel calibration needs the same model on every rank; for sharded "
                "models install the plugin of the framework that shards them",
            )
        for name, shape in theirs.items():
            if shape is not None and common.setdefault(name, shape) != shape:
                raise RankError(
                    f"the ranks saw inputs with scales of shapes {common[name]} and {shape}",
                    where=name,
                    hint="use granularity: tensor, or rows of one length on every rank",
                )
    if not common:
        return dict(values)
    device = _device(v for v in values.values() if v is not None)
    parts: list[Tensor] = []
    for name, shape in common.items():
        value = values[name]
        value = torch.full(shape, -torch.inf) if value is None else value  # another rank has one
        parts.append(value.float().to(device).reshape(-1))
    flat = torch.cat(parts)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    pieces = torch.split(flat, [part.numel() for part in parts])
    reduced = {n: p.reshape(s) for (n, s), p in zip(common.items(), pieces, strict=True)}
    return {name: reduced.get(name) for name in values}


def reduce_sum(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the elementwise sum over all ranks; in one process, the values themselves.

    Args:
        values: Name to counts; names, shapes and dtypes are those of the other ranks, which
            `reduce_max` has made sure of.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return dict(values)
    device = _device(values.values())
    reduced: dict[str, Tensor] = {}
    for name, value in values.items():  # one by one: all of them may be large
        total = value.to(device, copy=True)
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        reduced[name] = total.to(value.device)
    return reduced


def _device(values: Iterable[Tensor]) -> torch.device:
    """Return where the ranks' backend takes tensors from."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return next((value.device for value in values), torch.device("cpu"))
