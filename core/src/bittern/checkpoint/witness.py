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
        # as double, since no NaN of float8 can be compared
        here, there = (sample.to(coarse).double().nan_to_num() for sample in (found, saved))
        if not torch.equal(here, there):
            raise CheckpointError(
                f"{name} is not the weight that this state was saved beside",
                where=where,
                hint="load the weights that belong to it first; calibration may have changed them",
            )


def _sample(tensor: Tensor) -> Tensor:
    flat = whole(tensor.detach()).reshape(-1)
    count, last = min(COUNT, len(flat)), len(flat) - 1
    # whole numbers: above 2**24, those of linspace are not exact, and the last is beyond the end
    index = [last * i // max(count - 1, 1) for i in range(count)]
    return flat[torch.tensor(index, device=flat.device)].cpu()
