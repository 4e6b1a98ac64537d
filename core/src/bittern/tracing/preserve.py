"""Tracing runs the user's ``forward``; this leaves the model as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["unchanged"]

_CONTAINERS = (dict, list, set)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the attributes of all modules back afterwards, and the random state.

    A ``forward`` that remembers something would otherwise leave torch.fx proxies in the model, one
    that assigns ``weight.data`` tensors without values. Attributes, the containers among them and
    the memory of parameters and buffers are restored; what is in that memory is not copied. Methods
    that `functools.lru_cache` wraps forget what they computed, as tables of rotary embeddings do.
    """
    tensors = [
        (tensor, tensor.data, tensor.requires_grad)
        for tensor in (*model.parameters(), *model.buffers())
        if not is_lazy(tensor)
    ]
    classes = [(module, type(module)) for module in model.modules()]
    kept: list[tuple[nn.Module, dict[str, Any], list[tuple[Any, Any]]]] = []
    for module in model.modules():
        attributes = dict(vars(module))
        # The containers of parameters, buffers, modules and hooks are among these.
        held = [v for v in attributes.values() if isinstance(v, _CONTAINERS)]
        kept.append((module, attributes, [(v, v.copy() if v else None) for v in held]))
    gpus = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for module, kind in classes:
            if type(module) is not kind:
                module.__class__ = kind
        for tensor, data, learns in tensors:
            if not _same_memory(tensor, data):
                tensor.data = data
            if tensor.requires_grad is not learns:
                tensor.requires_grad_(learns)
        _forget(model)
        for module, attributes, containers in kept:
            _restore(module.__dict__, attributes)
            for container, content in containers:
                if content is None:
                    container.clear()
                else:
                    _restore(container, content)


def _forget(model: nn.Module) -> None:
    """Empty the caches of memoized methods: they may hold tensors without values."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    for cls in classes - set(nn.Module.__mro__):
        for member in vars(cls).values():
            clear = getattr(member, "cache_clear", None)
            if callable(clear):
                clear()


def _same_memory(one: Tensor, two: Tensor) -> bool:
    try:
        return bool(one.untyped_storage()._cdata == two.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a wrapper of other tensors has none of its own
        return True


def _restore(container: Any, content: Any) -> None:
    """Give ``container`` the ``content`` again, element by element the same objects."""
    if isinstance(container, dict):
        same = len(container) == len(content) and all(
            key in container and container[key] is value for key, value in content.items()
        )
    elif isinstance(container, list):
        same = len(container) == len(content) and all(map(_is, container, content))
    else:
        same = container == content
    if same:
        return
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _is(left: object, right: object) -> bool:
    return left is right
