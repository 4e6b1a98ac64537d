"""Gram matrices of two ranks (gloo) are those of all their data, and so are rounded weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.calibration.context import CalibrationContext
from bittern.calibration.gram import observe_grams
from bittern.nn.observer import SharedInputs
from bittern.testing.processes import run_distributed

RECIPE = {"rules": [{"match": "*", "weight": {"format": "int4", "size": 8}}], "algorithm": "gptq"}
NAMES = ("a", "b", "late")


class Model(nn.Module):
    """Two readers of one tensor, one of which sees large inputs only, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.late = nn.Linear(16, 8), nn.Linear(16, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if bool(x.abs().max() > 50):
            y = y * self.b(x).sum(-1, keepdim=True)
        found: Tensor = self.late(y.relu())
        return found


def build() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, 16, generator=generator) * scale for scale in (1.0, 2.0, 3.0, 90.0)]


def found(data: list[Tensor]) -> dict[str, Any]:
    model = build()
    plan = bt.plan(model, RECIPE)
    bt.quantize(model, {**RECIPE, "algorithm": "max"})

    def forward() -> int:
        for x in data:
            model(x)
        return len(data)

    context = CalibrationContext(
        shared=SharedInputs(), access=lambda module, *, write: nullcontext()
    )
    grams = observe_grams(model, plan, forward, context)
    rounded = build()
    bt.quantize(rounded, RECIPE, data)
    return {
        "matrices": {name: gram.matrix for name, gram in grams.items()},
        "tokens": {name: gram.tokens for name, gram in grams.items()},
        "weights": {name: rounded.get_parameter(f"{name}.weight").detach() for name in NAMES},
    }


def on_rank(rank: int, world: int) -> dict[str, Any]:
    return found(batches()[rank::world])


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks found on its half of the batches."""
    return run_distributed(on_rank, world=2)


def test_both_ranks_have_the_sums_over_all_data(ranks: list[dict[str, Any]]) -> None:
    expected = found(batches())
    for own in ranks:
        for name in NAMES:
            path = f"{name}.weight"
            scale = expected["matrices"][path].abs().max()
            torch.testing.assert_close(
                own["matrices"][path] / scale,
                expected["matrices"][path] / scale,
                rtol=1e-5,
                atol=1e-6,
            )
            assert torch.equal(own["tokens"][path], expected["tokens"][path])
    assert expected["tokens"]["b.weight"].tolist() == [20]  # only one rank saw them


def test_both_ranks_round_alike(ranks: list[dict[str, Any]]) -> None:
    expected = found(batches())["weights"]
    for name in NAMES:
        one, other = (own["weights"][name] for own in ranks)
        assert torch.equal(one, other)
        same = (one - expected[name]).abs() < 1e-6  # sums in another order may decide a tie
        assert same.float().mean() > 0.95
