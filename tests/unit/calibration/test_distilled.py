"""Learned rounding of a whole model: the divergence of its outputs falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bittern as bt
from bittern.errors import CalibrationError
from bittern.nn import QuantModule

WIDTH, CLASSES = 32, 20


class Model(nn.Module):
    """Token ids to logits; without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES + 2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        x = x + self.down(self.up(self.norm(x)).relu())
        return {"logits": 4 * self.head(x)}


def build() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def data(filler: int = 0, padded: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        ids = torch.randint(0, CLASSES, (4, 8), generator=generator)
        mask = torch.ones(4, 8, dtype=torch.long)
        if padded:
            ids[:, -padded:], mask[:, -padded:] = filler, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def recipe(weight: Any, algorithm: str = "distill-rounding", **options: Any) -> dict[str, Any]:
    steps = {"steps": 30, **options} if algorithm == "distill-rounding" else options
    rule = {"match": {"class": "Linear"}, "weight": weight}
    return {"rules": [rule], "algorithm": [{"name": algorithm, "options": steps}]}


INT3 = {"format": "int3", "granularity": "group", "size": 16}


def divergence(model: nn.Module) -> float:
    plain = build()
    total = 0.0
    with torch.no_grad():
        for batch in data():
            p, q = (F.log_softmax(m(**batch)["logits"].double(), -1) for m in (plain, model))
            total += float((p.exp() * (p - q)).sum())
    return total


@pytest.mark.parametrize("weight", [INT3, "nvfp4", "mxfp4"])
def test_the_divergence_falls_below_that_of_rounding_to_nearest(weight: Any) -> None:
    nearest, learned = build(), build()
    bt.quantize(nearest, recipe(weight, "mse"), data())
    bt.quantize(learned, recipe(weight, steps=60), data())
    assert divergence(learned) < 0.9 * divergence(nearest)


def test_written_weights_are_rounded_already() -> None:
    model = build()
    bt.quantize(model, recipe("nvfp4", steps=5), data())
    for path in ("up", "down", "head"):
        module = model.get_submodule(path)
        assert isinstance(module, QuantModule)
        quantizer = module.quantizer("weight")
        assert quantizer is not None
        value: Any = module.weight
        assert torch.equal(quantizer(value), value)
        assert not torch.equal(value, build().get_submodule(path).weight)


def test_padding_does_not_count() -> None:
    found = []
    for filler in (CLASSES, CLASSES + 1):
        model, config = build(), recipe(INT3, steps=6)
        config["algorithm"].insert(0, "max")
        bt.quantize(model, config, data(filler, padded=3))
        found.append(model.up.weight.detach().clone())
    assert torch.equal(*found)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(CalibrationError, match="0 steps"):
        bt.quantize(build(), recipe(INT3, steps=0), data())
