"""Weights that lie on the disk, and are in memory while the block that holds them is at work.

A model larger than memory is made on the meta device. Its large tensors stay where they were
saved; a block's come into memory when it runs, or when somebody asks for one of its modules, and
go when that is over. What was written into them goes to another file, which then counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bittern.errors import ModelError

__all__ = [
    "Place",
    "held",
    "held_alone",
    "is_held",
    "move_to_disk",
    "on_disk",
    "places_of",
    "relocate",
]

SHELF = "_bittern_on_disk"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        path: A safetensors file.
        key: Its name there.
    """

    path: Path
    key: str

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor.

        Args:
            dtype: What it is to be in memory; by default what it is on the disk.

        Raises:
            ModelError: The file is gone or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                found: Tensor = file.get_tensor(self.key)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{self.key} cannot be read from the disk: {error}",
                where=str(self.path),
                hint="the files of a model that stays on the disk must stay there",
            ) from error
        return found if dtype is None else found.to(dtype)


@dataclass(frozen=True)
class _Stored:
    """A parameter that lies on the disk.

    Attributes:
        name: Its full name.
        meta: What stands for it meanwhile.
        place: Where it lies.
    """

    name: str
    meta: nn.Parameter
    place: Place


@dataclass(eq=False)
class _Shelf:
    """The parameters of one module that lie on the disk, and how many are using them."""

    stored: dict[str, _Stored]
    users: int = 0


def move_to_disk(model: nn.Module, blocks: Sequence[str], places: Mapping[str, Place]) -> None:
    """Let weights of a model's blocks stay on the disk.

    Args:
        model: A model whose parameters named in ``places`` are on the meta device; all others are
            real.
        blocks: Paths of its blocks, none within another.
        places: Parameter name to where it lies.

    Raises:
        ModelError: One of them is in no block.
    """
    left = dict(places)
    for path in blocks:
        root = model.get_submodule(path)
        for inner, module in root.named_modules(prefix=path):
            stored = {
                name: _Stored(f"{inner}.{name}", parameter, left.pop(f"{inner}.{name}"))
                for name, parameter in module.named_parameters(recurse=False)
                if f"{inner}.{name}" in left
            }
            if stored:
                module.__dict__[SHELF] = _Shelf(stored)
        root.__dict__["forward"] = partial(_run, root)
    if left:
        raise ModelError(
            f"{next(iter(left))} is in no block of the model, and has to be in memory",
            hint="load the model into memory",
        )


def on_disk(module: nn.Module) -> bool:
    """Whether weights of this very module lie on the disk."""
    return SHELF in module.__dict__


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return where the weights lie that are on the disk, by name."""
    return {stored.name: stored.place for shelf in _shelves(model) for stored in shelf.values()}


def relocate(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Say where weights lie from now on.

    Args:
        model: The model.
        places: Parameter name to place; names that are not on the disk are passed over.
    """
    for shelf in _shelves(model):
        for local, stored in shelf.items():
            if stored.name in places:
                shelf[local] = replace(stored, place=places[stored.name])


@contextmanager
def held(root: nn.Module) -> Iterator[None]:
    """Keep the weights of a module, and of all within, in memory meanwhile.

    What is written into those that lie on the disk is lost afterwards, unless somebody keeps it
    and calls `relocate`.
    """
    with ExitStack() as stack:
        for module in root.modules():
            stack.enter_context(held_alone(module))
        yield


@contextmanager
def held_alone(module: nn.Module) -> Iterator[None]:
    """Keep the weights of this very module in memory meanwhile."""
    shelf: _Shelf | None = module.__dict__.get(SHELF)
    if shelf is None:
        yield
        return
    if shelf.users == 0:
        for local, stored in shelf.stored.items():
            tensor = stored.place.load(stored.meta.dtype)
            requires_grad = stored.meta.requires_grad
            module._parameters[local] = nn.Parameter(tensor, requires_grad=requires_grad)
    shelf.users += 1
    try:
        yield
    finally:
        shelf.users -= 1
        if shelf.users == 0:
            for local, stored in shelf.stored.items():
                module._parameters[local] = stored.meta


def is_held(module: nn.Module) -> bool:
    """Whether the weights of this very module are in memory."""
    shelf: _Shelf | None = module.__dict__.get(SHELF)
    return shelf is None or shelf.users > 0


def _shelves(model: nn.Module) -> list[dict[str, _Stored]]:
    return [m.__dict__[SHELF].stored for m in model.modules() if on_disk(m)]


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block's own forward pass with its weights in memory."""
    forward: Callable[..., Any] = type(module).forward
    if _is_fake((args, kwargs)):  # a trace wants shapes only
        return forward(module, *args, **kwargs)
    with held(module):
        return forward(module, *args, **kwargs)


def _is_fake(arguments: Any) -> bool:
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is not None and any(
        isinstance(leaf, fakes.FakeTensor) for leaf in pytree.tree_leaves(arguments)
    )
