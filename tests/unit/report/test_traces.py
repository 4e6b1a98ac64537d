"""A trace on a terminal: block by block, what repeats is counted."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bittern.report.traces import show_trace
from bittern.toolkit import Toolkit
from bittern.tracing import Trace

Make = Callable[..., nn.Module]


def shown(trace: Trace, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    show_trace(trace, console)
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


@pytest.fixture
def trace(make_lm: Make, toolkit: Toolkit) -> Trace:
    return toolkit.trace(make_lm(depth=12), torch.zeros(1, 5, dtype=torch.int64))


def test_blocks_that_are_alike_are_one_row(trace: Trace) -> None:
    text = shown(trace)
    (row,) = [line for line in text.splitlines() if "q, k, v" in line]
    assert row.split("│")[1:3] == [" layers.{0..11} ", " 12 "]
    assert text.count("v.weight") == 2  # one row for twelve blocks, one for the stream


def test_the_last_line_counts(trace: Trace) -> None:
    last = shown(trace).splitlines()[-1]
    counted = f"{len(trace.groups)} groups, 12 shared inputs, {len(trace.foldable)} folds"
    assert "51 weight-bearing modules analysed (100%)" in last
    assert counted in last


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_any_width(width: int, trace: Trace) -> None:
    assert max(map(len, shown(trace, width).splitlines())) <= width


def test_what_was_not_analysed_is_shown_with_its_reason(toolkit: Toolkit) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    text = shown(toolkit.trace(Odd(), torch.randn(2, 4)))
    assert "not analysed" in text
    assert "it did not run with the example inputs" in text
    assert "(50%)" in text


def test_markup_in_names_is_not_interpreted(toolkit: Toolkit) -> None:
    model = nn.Sequential()
    model.add_module("[bold]a[/bold]", nn.Linear(4, 8))
    model.add_module("b", nn.Linear(8, 4))
    assert "[bold]a[/bold]" in shown(toolkit.trace(model, torch.randn(2, 4)))


def test_nothing_found_is_one_line(toolkit: Toolkit) -> None:
    text = shown(toolkit.trace(nn.Sequential(nn.ReLU()), torch.randn(2, 4)))
    expected = "0 weight-bearing modules analysed (100%); 0 groups, 0 shared inputs, 0 folds"
    assert text.splitlines() == [expected]
