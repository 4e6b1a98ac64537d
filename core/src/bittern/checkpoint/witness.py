"""Samples of a model's weights, which tell whether a state without weights is beside its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bittern.checkpoint.tensors import own_names, own_tensors
from bittern.errors import CheckpointError
from bittern.runtime.access import whole

__all__ = ["WITNESS", "check_witness", "witness"]

WITNESS = "bittern.witness/"
COUNT = 16


def witness(model: nn.Module) -> dict[str, Tensor]:
    """Return up to 16 evenly spread elements of every floating-point tensor of a model."""
    names = own_names(model)
    return {
        WITNESS + names.saved(name): _sample(tensor)
        for name, tensor in own_tensors(model).items()
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta"
    }


def check_witness(model: nn.Module, samples: Mapping[str, Tensor], *, where: str) -> None:
    """Raise if the weights of a model are not those that a state was saved beside.

    Samples are compared in the coarser of both dtypes, so that a model may be loaded in another.

    Raises:
        CheckpointError: A sample differs, with the first name.
    """
    names = own_names(model)
    own = own_tensors(model)
    for key, saved in samples.items():
        name = key.removeprefix(WITNESS)
        live = own.get(names.live(name))
        if live is None or live.device.type == "meta" or not live.is_floating_point():
            continue
        found = _sample(live)
        coarse = min(found.dtype, saved.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        same = found.shape == saved.shape and torch.equal(
            found.to(coarse).nan_to_num(), saved.to(coarse).nan_to_num()
        )
        if not same:
            raise CheckpointError(
                f"{name} is not the weight that this state was saved beside",
                where=where,
                hint="load the weights that belong to it first; calibration may have changed them",
            )


def _sample(tensor: Tensor) -> Tensor:
    flat = whole(tensor.detach()).reshape(-1)
    index = torch.linspace(0, len(flat) - 1, min(COUNT, len(flat)), device=flat.device)
    return flat[index.long()].cpu()
