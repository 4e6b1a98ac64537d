"""Coverage: which modules were analysed in all their dimensions, and where it stopped and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bittern.toolkit import Toolkit

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Some(nn.Module):
    """Reads some of what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.aside = nn.Linear(4, 4)
        self.scale, self.offset = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.relu = nn.ReLU()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.aside.weight
        return self.norm(self.relu(self.used(x * self.scale)))


def test_modules_with_weights_are_counted(toolkit: Toolkit) -> None:
    coverage = toolkit.trace(Some(), X).coverage
    assert coverage.analysed == ("used",)
    assert coverage.fraction == pytest.approx(1 / 4)  # the model, used, unused, aside
    assert dict(coverage.barriers) == {
        "": "offset was not read with the example inputs",
        "unused": "it did not run with the example inputs",
        "aside": "it did not run with the example inputs",
    }


def test_a_module_that_several_paths_name_is_counted_once(toolkit: Toolkit) -> None:
    linear = nn.Linear(4, 4)
    coverage = toolkit.trace(nn.Sequential(linear, nn.ReLU(), linear), X).coverage
    assert coverage.analysed == ("0",)
    assert coverage.fraction == 1


def test_a_weight_that_several_modules_share_is_read_for_all(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    coverage = toolkit.trace(model, X).coverage
    assert coverage.analysed == ("0", "2")


def test_a_decision_on_a_mask_alone_is_noted_and_costs_nothing(toolkit: Toolkit) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if not mask.all():
                x = x * mask
            return self.b(self.a(x))

    trace = toolkit.trace(Masked(), (X, torch.ones(2, 4)))
    assert trace.coverage.analysed == ("a", "b")
    assert trace.coverage.barriers == {}
    assert [g.size for g in trace.groups] == [8]


def test_a_decision_inside_a_block_fixes_what_crosses_its_children_only(toolkit: Toolkit) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
            self.then, self.other = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.then(x) if x.mean() < 1e9 else self.other(x)

    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 4), Gated(), nn.Linear(5, 9), nn.ReLU())
    trace = toolkit.trace(model, X)
    assert {g.size for g in trace.groups} == {7, 6}
    assert "2.other did not run" in trace.coverage.barriers["2"]
    assert "2 decides by values" in trace.coverage.barriers["3"]
    assert "2.first.0" in trace.coverage.analysed or "2.first.0" in trace.coverage.barriers


def test_what_is_written_into_a_buffer_is_no_dead_end(toolkit: Toolkit) -> None:
    """A run for real holds the values that nobody reads for read outside of torch."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("cache", torch.zeros(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            hidden = self.a(x)
            self.cache.copy_(hidden)
            return self.b(hidden)

    trace = toolkit.trace(Caching(), X)
    assert not trace.flow.graph.fake
    (group,) = trace.groups
    assert {(m.module, m.tensor) for m in group.members} == {
        ("a", "weight"),
        ("a", "bias"),
        ("b", "weight"),
        ("", "cache"),
    }
