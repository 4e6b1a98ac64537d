"""An entry of the zoo: how a model is built, and what it is called with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

__all__ = ["Entry", "Example", "image", "randomize", "tokens"]

Inputs = Callable[[Generator], Mapping[str, Any]]


class Example(NamedTuple):
    """A model in float64 and eval mode, and two different calls of the same shapes."""

    model: nn.Module
    inputs: Mapping[str, Any]
    others: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: The test id.
        build: Builds the model.
        inputs: Draws keyword arguments of a call.
        rigid: Its code has sizes in it, so nothing can be removed.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    _: KW_ONLY
    rigid: bool = False

    def make(self) -> Example:
        """Build the same model every time."""
        torch.manual_seed(0)
        model = self.build().double().eval()
        generator = Generator().manual_seed(1)
        randomize(model, generator)
        return Example(model, self.inputs(generator), self.inputs(generator))


def randomize(model: nn.Module, generator: Generator) -> None:
    """Give every parameter and running statistic values that no two channels share.

    A fresh model has norms of ones, biases of zeros and running statistics of a standard normal:
    they are the same in every order, so a tracer that forgets them would not be caught.
    """

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.endswith(("weight", "proj", "_ih_l0", "_hh_l0")):
            parameter.data = noise(parameter) / math.sqrt(parameter[0].numel())
        else:
            parameter.data = parameter.data + 0.3 * noise(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith((".weight", ".bias")) and buffer.is_floating_point():  # a frozen norm
            buffer.add_(0.3 * noise(buffer))
        elif name.endswith("running_mean"):
            buffer.copy_(0.3 * noise(buffer))
        elif name.endswith("running_var"):
            # Small, so that what comes in is not lost on the way through many layers.
            uniform = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
            buffer.copy_(0.05 + 0.1 * uniform)


def image(size: int = 8, channels: int = 3, name: str = "x") -> Inputs:
    """Two random images."""
    return lambda generator: {
        name: torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
    }


def tokens(vocab: int, length: int = 7, *names: str, **constant: Any) -> Inputs:
    """Two random rows of token ids under each name; ``input_ids`` if none is given."""
    return lambda generator: {
        **{
            name: torch.randint(3, vocab, (2, length), generator=generator)
            for name in names or ("input_ids",)
        },
        **constant,
    }
