"""Layers whose weight the parent reads itself: what counts as a call, and what the plan says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import bittern as bt
from bittern.errors import PlanError
from bittern.planning.only_read import only_read


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.fine = nn.Linear(4, 4)
        nn.init.ones_(self.fine.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fine(x), self.inner.weight, self.inner.bias)


class Inherits(Base):
    """The read is in the base."""


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fine(x)) if self.training else super().forward(x)


class HandsOn(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(self.inner, self.fine)(x) + self.inner.weight.sum()


class ByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "inner")(x) + self.inner.weight.sum()  # noqa: B009


class AsksOnly(nn.Module):
    """Reads no numbers of the weight; somebody else calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def _init_weights(self) -> None:
        self.inner.weight.data.fill_(1)

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.inner.weight.dtype)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Base, True),
        (Inherits, True),
        (Calls, False),
        (HandsOn, False),
        (ByName, False),
        (AsksOnly, False),
        (lambda: nn.Sequential(nn.Linear(4, 4)), False),
    ],
)
def test_a_layer_is_only_read_if_nothing_else_is_done_with_it(
    make: Callable[[], nn.Module], expected: bool
) -> None:
    assert only_read(make(), "inner") is expected


def test_a_called_sibling_is_not_only_read() -> None:
    assert not only_read(Base(), "fine")


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only"])
def test_the_plan_leaves_such_a_layer_and_says_why(recipe: str) -> None:
    plan = bt.plan(nn.ModuleDict({"mixer": Base()}), recipe)
    assert plan.modules == ("mixer.fine",)
    assert plan.skipped["mixer.inner"] == "mixer reads its weight and never calls it"


def test_a_recipe_that_quantizes_nothing_tells_first_of_what_it_named() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4), Base())
    with pytest.raises(PlanError, match="quantizes nothing") as caught:
        bt.plan(model, "int8", overrides=['skip.+="*.fine"'])
    assert str(caught.value.hint).startswith("3.inner: 3 reads its weight")
