"""Core's rules for recurrent, transposed and bag layers, norms, pools, activations pass the kit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bittern.testing import ModuleCase, ModuleConformance


def normal(*shape: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda generator: (torch.randn(shape, generator=generator),)


def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 10, generator=generator), torch.randn(4, 6, generator=generator)


def ids(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(0, 30, (5, 7), generator=generator),)


def transposed(make: Any, dimensions: int, **options: Any) -> ModuleCase:
    shape = [2, 4, 6, 5, 4][: 2 + dimensions]
    name = f"conv-transpose{dimensions}d"
    return ModuleCase(name, make=lambda: make(4, 8, 3, **options), inputs=normal(*shape))


def recurrent(name: str, make: Callable[[], nn.Module]) -> ModuleCase:
    return ModuleCase(name, make=make, inputs=normal(5, 3, 8))


class TestLayers(ModuleConformance):
    hooks = "bittern.builtin.hooks"

    def cases(self) -> list[ModuleCase]:
        return [
            ModuleCase("bilinear", make=lambda: nn.Bilinear(10, 6, 8), inputs=pair),
            transposed(nn.ConvTranspose1d, 1, stride=2, output_padding=1),
            transposed(nn.ConvTranspose2d, 2, groups=2, bias=False),
            transposed(nn.ConvTranspose3d, 3, groups=4, padding=1),
            ModuleCase("bag-mean", make=lambda: nn.EmbeddingBag(30, 8, padding_idx=1), inputs=ids),
            ModuleCase(
                "bag-sum-sparse",
                make=lambda: nn.EmbeddingBag(30, 8, mode="sum", sparse=True),
                inputs=ids,
            ),
            recurrent("rnn", lambda: nn.RNN(8, 6, nonlinearity="relu", batch_first=True)),
            recurrent("gru", lambda: nn.GRU(8, 6, num_layers=2, bidirectional=True)),
            recurrent("lstm", lambda: nn.LSTM(8, 6, bidirectional=True, proj_size=4)),
            recurrent("lstm-without-bias", lambda: nn.LSTM(8, 6, bias=False, batch_first=True)),
            ModuleCase("batch-norm", make=lambda: nn.BatchNorm2d(4), inputs=normal(2, 4, 5, 5)),
            ModuleCase("layer-norm", make=lambda: nn.LayerNorm(16), inputs=normal(4, 16)),
            ModuleCase("max-pool", make=lambda: nn.MaxPool2d(2), inputs=normal(2, 3, 6, 6)),
            ModuleCase("gelu", make=nn.GELU, inputs=normal(4, 16)),
        ]
