"""Physical tests draw weights: every test draws the same ones, whatever ran before it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Give every test the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
