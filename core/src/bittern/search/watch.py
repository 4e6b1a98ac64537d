"""Looks at modules while a model runs: what they return as they are, and quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bittern.nn import QuantModule, TensorQuantizer, quantizers_off

__all__ = ["OnOutput", "only", "watching"]

# Called with the path, the output as it is and as quantized; what it returns replaces the output.
OnOutput = Callable[[str, Tensor, Tensor], Tensor]


@contextmanager
def only(model: nn.Module, modules: Iterable[str]) -> Iterator[None]:
    """Let some converted modules quantize while the block runs, and no other.

    Args:
        model: A converted model.
        modules: Their paths.
    """
    with quantizers_off(model):
        chosen = [link for path in modules for link in _links(model.get_submodule(path))]
        for link in chosen:
            link.enabled = True
        try:
            yield
        finally:
            for link in chosen:
                link.enabled = False


@contextmanager
def watching(
    model: nn.Module, modules: Mapping[str, Iterable[str]], then: OnOutput
) -> Iterator[None]:
    """Run every module that is watched a second time on the same input, quantized.

    The model itself runs unquantized, so each module is seen on its own.

    Args:
        model: A converted and calibrated model.
        modules: Paths of the modules, to those that quantize when they are run again.
        then: What to do with their outputs; of a module that returns several, the first.
    """
    handles = []
    watch = _Watch(then)
    with quantizers_off(model):
        try:
            for path, inner in modules.items():
                module = model.get_submodule(path)
                links = [link for name in inner for link in _links(model.get_submodule(name))]
                hook = watch.hook(path, links)
                handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Watch:
    """Runs watched modules a second time; what they call meanwhile is not watched."""

    def __init__(self, then: OnOutput) -> None:
        self._then = then
        self._repeating = False

    def hook(self, path: str, links: Sequence[TensorQuantizer]) -> Callable[..., Any]:
        """Return the forward hook of a module, and of the quantizers that are its."""

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if self._repeating:
                return None
            own, rounded = _first(output), self._rounded(module, links, args, kwargs)
            if own is None or rounded is None:
                return None
            found = self._then(path, own, rounded)
            if found is own:
                return None
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return hook

    def _rounded(
        self, module: nn.Module, links: Sequence[TensorQuantizer], args: Any, kwargs: Any
    ) -> Tensor | None:
        """Return what a module computes with some quantizers on."""
        self._repeating = True
        try:
            for link in links:
                link.enabled = True
            with torch.no_grad():
                return _first(type(module).forward(module, *args, **kwargs))
        finally:
            self._repeating = False
            for link in links:
                link.enabled = False


def _first(output: Any) -> Tensor | None:
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _links(module: nn.Module) -> list[TensorQuantizer]:
    """Return the quantizers of a module, those down a chain included."""
    if not isinstance(module, QuantModule):
        return []
    return [link for quantizer in module.slots().values() for link in quantizer.chain()]
