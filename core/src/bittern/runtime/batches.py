"""Runs batches through a model: calling conventions, devices, token checks.

A batch is a mapping (keyword arguments), a tuple or list (the first item is the model's input, the
others are targets, as a DataLoader yields them), or the input itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bittern.errors import DataError
from bittern.records import ModelAdapter

__all__ = ["Batch", "Data", "call_forward", "evaluating", "length_of", "prepare"]

Data = Iterable[Any] | Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """One batch, ready for the model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments, the adapter's included.
        targets: What came beside the input, on the model's device.
        ids: The token ids ``(rows, tokens)``, where there are any.
        mask: Which of ``ids`` are no padding, in their shape; a mask of another shape says who may
            attend to whom, and nothing about padding.
        rows: Rows of the batch.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: tuple[Any, ...] = ()
    ids: Tensor | None = None
    mask: Tensor | None = None
    rows: int = 1

    def run(self, model: nn.Module) -> Any:
        """Return the model's output."""
        return model(*self.args, **self.kwargs)


def prepare(raw: Any, model: nn.Module, adapter: ModelAdapter, *, index: int) -> Batch:
    """Move a batch to the model's device and check its token ids.

    Args:
        raw: A batch.
        model: The model; its first parameter gives the device.
        adapter: Gives the vocabulary and extra keyword arguments.
        index: Number of the batch, for errors.

    Raises:
        DataError: Token ids beyond the vocabulary, or an empty batch.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    targets: tuple[Any, ...] = ()
    mask: Tensor | None = None
    if isinstance(raw, Mapping):
        given = {k: v for k, v in raw.items() if k != "labels"}
        targets = (raw["labels"],) if "labels" in raw else ()
        ids = given.get("input_ids")
        mask = _padding(given.get("attention_mask"), ids=given.get("input_ids"))
        first = ids if ids is not None else next(iter(given.values()), None)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = given
    else:
        if isinstance(raw, tuple | list):
            if not raw:
                raise DataError(f"batch {index} is empty")
            first, targets = raw[0], tuple(raw[1:])
        else:
            first = raw
        ids = first if isinstance(first, Tensor) and not first.is_floating_point() else None
        args, kwargs = (first,), {}
    rows = len(first) if isinstance(first, Tensor) and first.dim() else 1
    if isinstance(first, Tensor) and first.numel() == 0:
        raise DataError(f"batch {index} is empty", hint="leave out rows without data")
    if isinstance(ids, Tensor) and adapter.vocab_size is not None:
        _check_ids(ids, adapter.vocab_size, index)
    kwargs = {**{k: v for k, v in adapter.call_kwargs.items() if k not in kwargs}, **kwargs}
    return Batch(
        args=_moved(args, device),
        kwargs=_moved(kwargs, device),
        targets=_moved(targets, device),
        ids=_moved(ids, device) if isinstance(ids, Tensor) else None,
        mask=_moved(mask, device),
        rows=rows,
    )


def _padding(mask: Any, *, ids: Any) -> Tensor | None:
    if not (isinstance(mask, Tensor) and isinstance(ids, Tensor)):
        return None
    return mask if mask.shape == ids.shape else None


def _check_ids(ids: Tensor, vocab_size: int, index: int) -> None:
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise DataError(
            f"batch {index} holds the token id {bad}, the vocabulary ends at {vocab_size - 1}",
            hint="the data was made with another tokenizer; tokenize it with this model's",
        )


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value if device is None or value.device == device else value.to(device)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple | list):
        moved = [_moved(v, device) for v in value]
        named = hasattr(value, "_fields")  # a namedtuple takes its fields one by one
        return type(value)(*moved) if named else type(value)(moved)
    return value


def call_forward(function: Callable[..., Any], model: nn.Module) -> None:
    """Call a user's ``forward_loop`` that takes the model, or nothing.

    Raises:
        DataError: It takes more than the model.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        function(model)
        return
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(needed) > 1:
        raise DataError(
            f"the data function takes {len(needed)} arguments",
            hint="give an iterable of batches, or a function of the model",
        )
    if needed or variadic:
        function(model)
    else:
        function()


def length_of(data: Data) -> int | None:
    """Return the number of batches where it is known."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Put a model into eval mode without gradients; restore every module's mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
