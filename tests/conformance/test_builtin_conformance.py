"""Core's own rules pass the kit that every plugin passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bittern.records import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from bittern.testing import (
    AlgorithmCase,
    AlgorithmConformance,
    ExportCase,
    ExporterConformance,
    FormatConformance,
    ModuleCase,
    ModuleConformance,
    PluginConformance,
)

CORE = "bittern.builtin.hooks"


class TestPlugin(PluginConformance):
    hooks = CORE


def normal(*shape: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda generator: (torch.randn(shape, generator=generator),)


class TestModules(ModuleConformance):
    hooks = CORE

    def cases(self) -> list[ModuleCase]:
        return [
            ModuleCase(
                "linear", make=lambda: nn.Linear(32, 16), inputs=normal(8, 32), experts=True
            ),
            ModuleCase(
                "linear-without-bias",
                make=lambda: nn.Linear(16, 24, bias=False),
                inputs=normal(2, 3, 16),
            ),
            ModuleCase(
                "embedding",
                make=lambda: nn.Embedding(40, 12, padding_idx=0),
                inputs=lambda g: (torch.randint(0, 40, (4, 9), generator=g),),
            ),
            ModuleCase(
                "conv1d",
                make=lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular"),
                inputs=normal(2, 6, 11),
            ),
            ModuleCase(
                "conv2d",
                make=lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2),
                inputs=normal(2, 4, 9, 9),
                experts=True,
            ),
            ModuleCase(
                "conv3d",
                make=lambda: nn.Conv3d(2, 4, 2, dilation=2, bias=False),
                inputs=normal(1, 2, 5, 6, 7),
            ),
        ]


class TestFormats(FormatConformance):
    hooks = CORE
    granularities = (PerTensor(), PerChannel(0), PerToken(), PerGroup(16), PerBlock(4, 8))
    examples = 6  # of very many formats; tests/unit/numerics/test_law.py looks further


class TestAlgorithms(AlgorithmConformance):
    hooks = CORE

    def cases(self) -> list[AlgorithmCase]:
        return [
            AlgorithmCase("max"),
            AlgorithmCase("percentile"),
            AlgorithmCase("entropy"),
            AlgorithmCase("mse"),
            AlgorithmCase("smooth", pipeline=["smooth", "max"]),
            AlgorithmCase("awq", tolerance=1e-4),
            AlgorithmCase("bias-correction", pipeline=["max", "bias-correction"]),
            AlgorithmCase("fold-batchnorm", pipeline=["fold-batchnorm", "max"]),
        ]


class Tied(nn.Module):
    """Two layers with one weight, of which the plan quantizes the first, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.register_buffer("offset", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x))) + self.offset


class TestSafetensors(ExporterConformance):
    hooks = CORE
    format = "safetensors"

    def cases(self) -> list[ExportCase]:
        return [
            ExportCase(
                "static",
                make=lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)),
                recipe="int8",
                data=lambda g: [torch.randn(4, 16, generator=g) for _ in range(2)],
            ),
            ExportCase(
                "convolutions",
                make=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).bfloat16(),
                recipe="int8-weight-only",
            ),
            ExportCase("tied", make=Tied, recipe={"rules": [{"match": "first", "weight": "fp8"}]}),
        ]
