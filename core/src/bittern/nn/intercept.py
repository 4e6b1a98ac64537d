"""Shows the quantizers of one module the operands of functional calls in its forward.

An `Intercept` is a torch function mode, so it is seen by one thread only, ends with its ``with``
block whatever happens in it, and costs nothing outside of it. One instance serves one forward pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bittern.nn.module import QuantModule
from bittern.nn.quantizer import TensorQuantizer

__all__ = [
    "MATMULS",
    "Call",
    "Intercept",
    "Marks",
    "Place",
    "active_slots",
    "is_active",
    "looking",
    "path_of",
    "sealed",
    "variants",
]


# --- calls ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where an argument of a function is.

    Attributes:
        index: Its position.
        names: Its names as a keyword; functions and methods of torch differ.
    """

    index: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One call of a function of torch."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, place: Place, default: Any = None) -> Any:
        """Return the argument at a place, ``default`` where it was not given."""
        if place.index < len(self.args):
            return self.args[place.index]
        for name in place.names:
            if name in self.kwargs:
                return self.kwargs[name]
        return default

    def put(self, place: Place, value: Any) -> Call:
        """Return the call with another argument at a place where one was given."""
        if place.index < len(self.args):
            before, after = self.args[: place.index], self.args[place.index + 1 :]
            return Call(self.func, (*before, value, *after), self.kwargs)
        name = next(name for name in place.names if name in self.kwargs)
        return Call(self.func, self.args, {**self.kwargs, name: value})

    def run(self) -> Any:
        """Make the call."""
        return self.func(*self.args, **self.kwargs)


def variants(*names: str) -> tuple[Callable[..., Any], ...]:
    """Return every form of the named functions: of torch, of tensors, of torch.nn.functional."""
    homes = (torch, torch.Tensor, torch.nn.functional, torch.special)
    found = [getattr(home, name) for name in names for home in homes if hasattr(home, name)]
    return tuple(dict.fromkeys(found))


_LEFT = Place(0, ("input", "self"))
_RIGHT = Place(1, ("other", "mat2", "tensor2"))
_ADDED = (Place(1, ("batch1", "mat1")), Place(2, ("batch2", "mat2")))

# The products of two matrices, and where their operands are.
MATMULS: Mapping[Callable[..., Any], tuple[Place, Place]] = {
    **dict.fromkeys(variants("matmul", "__matmul__", "bmm", "mm"), (_LEFT, _RIGHT)),
    **dict.fromkeys(variants("baddbmm", "addmm"), _ADDED),
}


# --- tensors with a meaning -----------------------------------------------------------------------


class Marks:
    """Values attached to tensors by identity, without keeping the tensors alive.

    A score matrix is the largest tensor of an attention; holding on to each would cost memory.
    """

    def __init__(self) -> None:
        self._items: list[tuple[Callable[[], Tensor | None], tuple[int, ...]]] = []

    def __len__(self) -> int:
        return len(self._items)

    def add(self, x: Tensor, value: tuple[int, ...]) -> None:
        """Mark a tensor."""
        if torch.compiler.is_compiling():  # tensors of a graph take no memory, nor weak references
            self._items.append((lambda: x, value))
            return
        if len(self._items) > 8:
            self._items = [item for item in self._items if item[0]() is not None]
        self._items.append((weakref.ref(x), value))

    def get(self, x: object) -> tuple[int, ...] | None:
        """Return all that a tensor was marked with, ``None`` where it has no mark."""
        found: tuple[int, ...] = ()
        for reference, value in self._items:
            if reference() is x:
                found += value
        return found or None


# --- the mode -------------------------------------------------------------------------------------


class _Thread(threading.local):
    """The intercepts of a thread, the innermost last; ``None`` where none may look."""

    def __init__(self) -> None:
        self.stack: list[Intercept | None] = []


_THREAD = _Thread()


class Intercept(TorchFunctionMode):
    """Hands some calls of torch to `seen`, while the forward of one module runs.

    What happens in the forward of a child with an intercept of its own is the child's affair.
    Functions that the mode calls itself are not seen again.

    Attributes:
        watched: The functions that `seen` gets.
    """

    watched: frozenset[Callable[..., Any]] = frozenset()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function, by way of `seen` where it is watched."""
        if func in self.watched and self._innermost():
            return self.seen(Call(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def seen(self, call: Call) -> Any:
        """Return the result of a watched call."""
        return call.run()

    def _innermost(self) -> bool:
        # a graph has no nested intercepts to keep apart, and knows no thread
        return torch.compiler.is_compiling() or _THREAD.stack[-1] is self


@contextmanager
def looking(intercept: Intercept) -> Iterator[None]:
    """Let an intercept look while the block runs."""
    with _pushed(intercept), intercept:
        yield


@contextmanager
def sealed() -> Iterator[None]:
    """Keep the intercepts of modules further out from looking into this block."""
    with _pushed(None):
        yield


@contextmanager
def _pushed(intercept: Intercept | None) -> Iterator[None]:
    if torch.compiler.is_compiling():
        yield
        return
    stack = _THREAD.stack
    stack.append(intercept)
    try:
        yield
    finally:
        stack.pop()


# --- modules --------------------------------------------------------------------------------------


def is_active(quantizer: TensorQuantizer | None) -> bool:
    """Whether a quantizer, or one down its chain, changes its tensor or learns its range."""
    while quantizer is not None:
        if quantizer.observer is not None or quantizer.transforms is not None:
            return True
        if quantizer.enabled and quantizer.calibrated:
            return True
        quantizer = quantizer.then
    return False


def active_slots(module: QuantModule, slots: tuple[str, ...]) -> list[str]:
    """Return the slots among ``slots`` whose quantizers look at their tensors."""
    return [slot for slot in slots if is_active(module.quantizer(slot))]


def path_of(module: nn.Module) -> str:
    """Return the path of a converted module, as its quantizers know it, for errors."""
    for child in module.children():
        if isinstance(child, TensorQuantizer) and child.name:
            return child.name.rpartition(".")[0] or type(module).__qualname__
    return type(module).__qualname__
