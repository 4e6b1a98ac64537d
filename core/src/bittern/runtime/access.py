"""Weight access without a plugin: resident weights are real already, meta weights are an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bittern.errors import ModelError

__all__ = ["resident"]


@contextmanager
def resident(module: nn.Module, *, write: bool, path: str = "") -> Iterator[None]:
    """Check that a module's own weights are real tensors.

    Raises:
        ModelError: They are on the meta device: offloaded, or never loaded.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.device.type == "meta":
            raise ModelError(
                f"the weight {name!r} of a {type(module).__name__} is on the meta device",
                where=path or None,
                hint="load the weights, or install the plugin of the framework that offloads them "
                "(bittern-accelerate)",
            )
    yield
