"""Weight access without a plugin: whole weights where they are in memory, in shards or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bittern.errors import ModelError
from bittern.runtime.ondisk import held_alone, is_held

__all__ = ["is_sharded", "resident", "shard_like", "whole"]

COMPUTED = "parametrizations"  # children that hold what a weight is computed from


@contextmanager
def resident(module: nn.Module, *, write: bool, path: str = "") -> Iterator[None]:
    """Give a module its own weights as whole tensors, and take them back into shards.

    Weights that are whole stay what they are; those on the disk are in memory meanwhile. Of one in
    shards (a DTensor, as FSDP2 leaves it outside of the forward pass), every rank gets a whole copy
    within the block, so all ranks have to come here, in one order.

    Args:
        module: The module; what parametrizations compute its weights from belongs to it.
        write: Whether what the block wrote into the weights goes into the shards.
        path: Its path, for errors.

    Raises:
        ModelError: Weights are on the meta device: offloaded, or never loaded; or what would be
            written into weights on the disk would be kept by nobody.
    """
    if write and not is_held(module):
        raise ModelError(
            "weights that lie on the disk can be changed only block by block",
            where=path or None,
            hint="give a work directory, in which changed weights are kept",
        )
    with ExitStack() as stack:
        for one in (module, *_computing(module)):
            stack.enter_context(held_alone(one))
        stack.enter_context(_unsharded(module, write=write, path=path))
        yield


@contextmanager
def _unsharded(module: nn.Module, *, write: bool, path: str) -> Iterator[None]:
    """Give a module its own weights as whole tensors, and take them back into shards."""
    if dist.is_available() and dist.is_initialized():
        module.state_dict()  # after a forward pass, this is what puts FSDP2's weights into shards
    holders = [module, *_computing(module)]
    shards: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for holder in holders:
        for name, parameter in holder.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                raise ModelError(
                    f"the weight {name!r} of a {type(module).__name__} is on the meta device",
                    where=path or None,
                    hint="load the weights, or install the plugin of the framework that offloads "
                    "them (bittern-accelerate)",
                )
            if is_sharded(parameter):
                shards.append((holder._parameters, name, parameter))
    try:
        for parameters, name, parameter in shards:
            full = whole(parameter.detach())
            parameters[name] = nn.Parameter(full, requires_grad=parameter.requires_grad)
        yield
        if write:
            with torch.no_grad():
                for parameters, name, parameter in shards:
                    parameter.copy_(shard_like(parameters[name], parameter))
    finally:
        for parameters, name, parameter in shards:
            parameters[name] = parameter


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: of several processes, each of which may hold a part."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one who did not import it
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, or all of a DTensor: then every rank has to come here.

    Args:
        tensor: Any shape and dtype.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor()
    return full


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, the same on every rank, in the shards of a DTensor.

    Nothing is sent. A ``like`` that is no DTensor gets the value itself.

    Args:
        value: The tensor.
        like: A tensor of the same shape.
    """
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    return distribute_tensor(
        value.detach().to(like.device), target.device_mesh, target.placements, src_data_rank=None
    )


def _computing(module: nn.Module) -> Iterator[nn.Module]:
    child = module._modules.get(COMPUTED)
    if child is not None:
        yield from child.modules()
