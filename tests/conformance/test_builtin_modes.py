"""Core's own modes pass the kit that every plugin's modes pass."""

from __future__ import annotations

import torch

from bittern.testing import ModeCase, ModeConformance

RECIPE = {
    "name": "static",
    "rules": [{"match": {"class": "Linear"}, "weight": "int4", "input": "int8"}],
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 16, generator=generator) for _ in range(2)]


class TestModes(ModeConformance):
    hooks = "bittern.builtin.hooks"

    def cases(self) -> list[ModeCase]:
        quantize = ("quantize", {"recipe": RECIPE})
        return [
            ModeCase("quantize", options={"recipe": RECIPE}, data=batches),
            ModeCase("fold", before=[quantize], data=batches),
            ModeCase("compress", before=[quantize], data=batches),
        ]
