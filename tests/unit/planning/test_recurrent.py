"""Slots that depend on the module: an LSTM has some per layer and direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern
from bittern.records import Plan
from bittern.toolkit import Toolkit

WEIGHTS = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
INPUTS = ["input_l0", "hidden_l0", "input_l0_reverse", "hidden_l0_reverse"]


class Tagger(nn.Module):
    """A recurrent layer between an embedding and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.lstm = nn.LSTM(4, 6, **options)
        self.head = nn.Linear(2 * 6 if options.get("bidirectional") else 6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0])


def plan_of(toolkit: Toolkit, *rules: dict[str, Any], **options: Any) -> Plan:
    return toolkit.plan(Tagger(**options), {"rules": list(rules)})


def slots(plan: Plan) -> list[str]:
    return [entry.slot for entry in plan.entries if entry.module == "lstm"]


def test_weight_means_every_weight_of_every_layer_and_direction(toolkit: Toolkit) -> None:
    rule = {"match": "lstm", "weight": "int8"}
    assert slots(plan_of(toolkit, rule, bidirectional=True)) == WEIGHTS
    assert slots(plan_of(toolkit, rule, num_layers=2, proj_size=3)) == [
        f"weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh", "hr")
    ]


def test_input_means_both_operands_of_every_product(toolkit: Toolkit) -> None:
    rule = {"match": "lstm", "input": "int8", "output": "int8"}
    assert slots(plan_of(toolkit, rule, bidirectional=True)) == [*INPUTS, "output"]
    assert slots(plan_of(toolkit, rule, proj_size=3)) == [
        "input_l0",
        "hidden_l0",
        "proj_l0",
        "output",
    ]


def test_a_slot_can_be_switched_off_by_its_name(toolkit: Toolkit) -> None:
    rule = {"match": "lstm", "weight": "int8", "slots": {"weight_hh_l0": "none"}}
    assert slots(plan_of(toolkit, rule)) == ["weight_ih_l0"]


def test_a_plan_knows_shapes_and_bytes_of_every_weight(toolkit: Toolkit) -> None:
    plan = plan_of(
        toolkit, {"match": "lstm", "weight": {"format": "int8", "granularity": "channel"}}
    )

    assert {e.slot: e.shape for e in plan.entries} == {
        "weight_ih_l0": (24, 4),
        "weight_hh_l0": (24, 6),
    }
    assert {str(e.granularity) for e in plan.entries} == {"channel"}
    rest = 4 * (10 * 4 + 2 * 24 + 6 * 3 + 3)
    assert plan.bytes_after == 24 * (4 + 6) + 2 * 24 * 4 + rest


def test_the_shipped_recipes_leave_recurrent_layers_alone(toolkit: Toolkit) -> None:
    for name in ("int8", "int4", "fp8"):
        assert toolkit.plan(Tagger(), name).modules == ("head",)


@pytest.mark.parametrize("said", [{"weight": "int8"}, {"weight": "int8", "input": "int8"}])
def test_a_saved_lstm_comes_back_with_the_same_bits(
    said: dict[str, str], toolkit: Toolkit, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Tagger(num_layers=2, bidirectional=True).eval()
    fresh = Tagger(num_layers=2, bidirectional=True).eval()
    ids = torch.randint(0, 10, (2, 7))
    toolkit.quantize(model, {"rules": [{"match": "lstm", **said}]}, [ids])
    bittern.save(model, tmp_path / "state", toolkit=toolkit)
    bittern.restore(fresh, tmp_path / "state", toolkit=toolkit)

    with torch.no_grad():
        assert torch.equal(fresh(ids), model(ids))
    assert list(fresh.lstm.slots()) == list(model.lstm.slots())  # type: ignore[attr-defined]
