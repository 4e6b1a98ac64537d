"""Data that ranges are estimated from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DATA: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "uniform": lambda shape, g: torch.rand(shape, generator=g) * 2 - 1,
    "laplace": lambda shape, g: (
        torch.empty(shape).exponential_(generator=g) - torch.empty(shape).exponential_(generator=g)
    ),
    "outlier": lambda shape, g: _outlier(torch.randn(shape, generator=g)),
    "equal": lambda shape, _: torch.full(shape, 3.0),
    "zero": lambda shape, _: torch.zeros(shape),
}


def _outlier(x: Tensor) -> Tensor:
    x.flatten()[-1] = 40.0
    return x


@pytest.fixture(params=list(DATA))
def data(request: pytest.FixtureRequest) -> str:
    """The name of a distribution."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Tensor]:
    """Makes the same data every time: ``make_data("normal", 100, 4)``."""

    def make(name: str, *shape: int) -> Tensor:
        return DATA[name](shape, torch.Generator().manual_seed(7))

    return make
