"""Leaves a model exactly as it was, whatever a run does to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["untouched"]

_HELD = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and restore mode, attributes and random state afterwards.

    Tensors that the run overwrites in place are the recorder's affair.
    """
    before: list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]] = []
    for module in model.modules():
        held = {name: dict(module.__dict__[name]) for name in _HELD}
        before.append((module, dict(module.__dict__), held))
        module.__dict__["training"] = False
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
        for module, attributes, held in before:
            for name, entries in held.items():
                mapping = attributes[name]
                same = list(mapping) == list(entries) and all(
                    mapping[key] is item for key, item in entries.items()
                )
                if not same:
                    mapping.clear()
                    mapping.update(entries)
            module.__dict__.clear()
            module.__dict__.update(attributes)
