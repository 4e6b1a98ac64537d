"""Learned rounding of a whole model: the divergence of its outputs falls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bittern as bt
from bittern.errors import CalibrationError
from bittern.nn import QuantModule

WIDTH, CLASSES = 32, 20
KEY = "last_hidden_state"


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


@pytest.mark.parametrize("start", ["gptq", "awq"])
def test_it_goes_on_from_weights_that_steps_before_it_moved(start: str) -> None:
    """What is to be kept are the logits of the model before all steps."""
    first: Any = {"gptq": {"rounded": False}} if start == "gptq" else {"awq": {}}
    rule = {"match": {"class": "Linear"}, "weight": INT3, "input": "int8"}
    alone, both, layerwise = build(), build(), build()
    bt.quantize(alone, {"rules": [rule], "algorithm": [first]}, data())
    steps = {"rules": [rule], "algorithm": [first, {"distill-rounding": {"steps": 60}}]}
    bt.quantize(both, steps, data())
    bt.quantize(layerwise, steps, data(), layerwise=True)
    assert divergence(both) < 0.8 * divergence(alone)
    for name, parameter in both.named_parameters():
        torch.testing.assert_close(parameter, layerwise.get_parameter(name))


class Encoder(Model):
    """Gives hidden states, no logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(input_ids, attention_mask)["logits"]
        return {KEY: 10 * found}


def test_a_model_without_logits_keeps_its_outputs() -> None:
    torch.manual_seed(0)
    nearest = Encoder().eval()
    learned, plain = copy.deepcopy(nearest), copy.deepcopy(nearest)
    bt.quantize(nearest, recipe(INT3, "mse"), data())
    bt.quantize(learned, recipe(INT3, steps=60), data())
    errors = []
    for model in (nearest, learned):
        with torch.no_grad():
            pairs = [(model(**x), plain(**x)) for x in data()]
        errors.append(
            sum(
                float((a["last_hidden_state"] - b["last_hidden_state"]).square().sum())
                for a, b in pairs
            )
        )
    assert errors[1] < 0.9 * errors[0]


def test_tied_weights_are_what_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()
    )
    model.append(nn.Linear(WIDTH, WIDTH, bias=False))
    model[3].weight = model[0].weight
    ids = [torch.arange(WIDTH).reshape(4, 8)]
    rule = {"match": "1", "weight": INT3}
    steps = [{"gptq": {"rounded": False}}, {"distill-rounding": {"steps": 2}}]
    bt.quantize(model.eval(), {"rules": [rule], "algorithm": steps}, ids)
    assert model[3].weight is model[0].weight


def test_a_block_by_block_step_after_it_is_refused_with_a_work_directory(tmp_path: Path) -> None:
    steps = {**recipe(INT3), "algorithm": [{"distill-rounding": {"steps": 1}}, "gptq"]}
    model = build()
    with pytest.raises(CalibrationError, match="gptq goes block by block after distill-rounding"):
        bt.quantize(model, steps, data(), work_dir=tmp_path)
    for name, parameter in build().named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


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
