"""Bits and bytes are those that the plan of the result counts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bittern.errors import PlanError
from bittern.search.candidates import AS_IS, plan_candidates
from bittern.search.cost import Ledger
from bittern.search.groups import DecisionGroup, group_modules
from bittern.search.rules import recipe_of, slots_data
from bittern.toolkit import Toolkit

WHOLE = ["Linear", "Conv2d", "Embedding", "LSTM"]
CANDIDATES = {
    "small": {"rules": [{"match": {"class": WHOLE}, "weight": "int4"}], "strict": False},
    "large": {
        "rules": [
            {"match": {"class": WHOLE}, "weight": {"format": "int8", "granularity": "channel"}}
        ],
        "strict": False,
    },
    "floats": {"rules": [{"match": {"class": "Linear"}, "weight": "nvfp4"}], "strict": False},
}


class Tied(nn.Module):
    """An embedding and an output layer that hold one parameter, and a linear of its own."""

    def __init__(self, *, quantize_both: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16) if quantize_both else Lookup(32, 16)
        self.mid = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)))


class Lookup(nn.Module):
    """A table that no rule knows."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


MODELS = {
    "odd shapes": lambda: nn.Sequential(nn.Linear(37, 19), nn.ReLU(), nn.Linear(19, 5, bias=False)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(28, 5)
    ),
    "half": lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(torch.bfloat16),
    "a recurrent layer": lambda: nn.ModuleDict(
        {"lstm": nn.LSTM(32, 16, num_layers=2), "out": nn.Linear(16, 4)}
    ),
    "tied, both quantized": lambda: Tied(quantize_both=True),
    "tied, one quantized": lambda: Tied(quantize_both=False),
    "a computed weight": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(32, 16)), nn.Linear(16, 16)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_every_choice_costs_the_bytes_that_its_plan_counts(
    kind: str, seed: int, toolkit: Toolkit
) -> None:
    model = MODELS[kind]()
    every = plan_candidates(model, CANDIDATES, toolkit)
    tied = [("embed", "head")] if kind == "tied, both quantized" else []
    groups = group_modules(every.modules, tied)
    ledger = Ledger(model, every, every.modules)
    draw = random.Random(seed)
    choices = {
        group: draw.choice([AS_IS, *(c.name for c in every.every if group.members[0] in c.entries)])
        for group in groups
    }
    choices[groups[0]] = "small"  # a plan has to quantize something

    total = ledger.base + sum(ledger.cost(group, choice).bytes for group, choice in choices.items())

    entries = {c.name: c.entries for c in every.every}
    formats = toolkit.registry.formats
    said = {
        path: slots_data(entries[choice][path], formats)
        for group, choice in choices.items()
        for path in group.members
        if path in entries.get(choice, {})
    }
    recipe = recipe_of(said, name="x", description="", algorithm=["max"])
    assert total == toolkit.plan(model, recipe).bytes_after


def test_bits_are_those_of_the_codes_and_scales(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(256, 64))
    every = plan_candidates(model, CANDIDATES, toolkit)
    ledger = Ledger(model, every, every.modules)
    group = DecisionGroup(("0",))

    assert ledger.elements(group) == 256 * 64
    assert ledger.cost(group, AS_IS).bits == 256 * 64 * 32
    assert ledger.cost(group, "large").bits == 256 * 64 * 8 + 64 * 32
    assert ledger.cost(group, "floats").bits == 256 * 64 * 4 + 256 * 64 // 16 * 8 + 32


def test_what_stays_is_counted_in_the_dtype_of_the_checkpoint(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(256, 64))
    every = plan_candidates(model, CANDIDATES, toolkit)
    ledger = Ledger(model, every, every.modules, dtype="bfloat16")
    assert ledger.cost(DecisionGroup(("0",)), AS_IS).bits == 256 * 64 * 16
    assert ledger.base == 64 * 2


def test_latencies_come_from_a_table_or_a_function(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    every = plan_candidates(model, CANDIDATES, toolkit)
    group = DecisionGroup(("0", "1"))
    row = {"small": 1.0, "large": 2.0, "floats": 3.0, AS_IS: 4.0}

    table = Ledger(model, every, every.modules, latency={"0": row, "1": row})
    function = Ledger(model, every, every.modules, latency=lambda path, choice: 2 * row[choice])

    assert table.cost(group, "large").seconds == 4.0
    assert function.cost(group, AS_IS).seconds == 16.0


@pytest.mark.parametrize("wrong", [None, -1.0, float("nan"), "fast"])
def test_a_latency_that_is_none_is_refused(wrong: Any, toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    every = plan_candidates(model, CANDIDATES, toolkit)
    ledger = Ledger(model, every, every.modules, latency={"0": {"small": wrong}})
    with pytest.raises(PlanError, match="its latency with 'small'") as caught:
        ledger.cost(DecisionGroup(("0",)), "small")
    assert caught.value.where == "0"
