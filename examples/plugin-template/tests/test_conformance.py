"""The plugin keeps what Bittern promises its users: the conformance kit, given our modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bittern.testing import (
    ExportCase,
    ExporterConformance,
    LeafCase,
    ModuleCase,
    ModuleConformance,
    OpCase,
    PluginConformance,
    SymbolCase,
    SymbolConformance,
    TraceConformance,
)
from torch import nn

from heron_framework.attention import DotProduct
from heron_framework.layers import Linear
from heron_framework.model import Encoder
from heron_framework.ops import swish


class TestPlugin(PluginConformance):
    plugin = "heron"


def normal(*shape: int, count: int = 1) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda generator: tuple(torch.randn(shape, generator=generator) for _ in range(count))


class TestModules(ModuleConformance):
    plugin = "heron"

    def cases(self) -> list[ModuleCase]:
        return [
            ModuleCase("linear", make=lambda: Linear(32, 16), inputs=normal(8, 32)),
            ModuleCase(
                "fused-swish",
                make=lambda: Linear(16, 24, bias=False, activation="swish"),
                inputs=normal(2, 3, 16),
            ),
            ModuleCase("dot-product", make=DotProduct, inputs=normal(2, 4, 8, count=3)),
        ]


class TestSymbols(SymbolConformance):
    plugin = "heron"

    def cases(self) -> list[SymbolCase]:
        return [SymbolCase("linear", make=lambda: Linear(32, 16), inputs=normal(8, 32))]


class TestTrace(TraceConformance):
    plugin = "heron"

    def cases(self) -> list[LeafCase | OpCase]:
        return [
            LeafCase("dot-product", make=DotProduct, inputs=normal(2, 4, 8, count=3)),
            OpCase("swish", call=swish, inputs=normal(3, 4, 5)),
        ]


def encoder() -> nn.Module:
    return Encoder(width=16, heads=2, depth=1)


class TestExport(ExporterConformance):
    plugin = "heron"
    format = "heron"

    def cases(self) -> list[ExportCase]:
        return [
            ExportCase(
                "encoder",
                make=encoder,
                recipe="heron-int8",
                data=lambda g: [torch.randn(2, 6, 16, generator=g) for _ in range(2)],
                unsupported={"rules": [{"match": {"class": "Linear"}, "weight": "fp8"}]},
            )
        ]
