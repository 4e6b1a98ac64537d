"""Modules that the tracer must not enter: their symbols carry the axes, or they are barriers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.records import LeafRule, SymbolRule
from bittern.testing import PluginHarness, hooks_module
from bittern.toolkit import Toolkit

LINEAR = "torch.nn.modules.linear:Linear"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.side = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inp(x))
        return self.out(torch.relu(self.mid(x)) * self.side(x))


class Opaque(nn.Module):
    """A fused layer: an activation and a linear, with a bias that no rule speaks of."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, width))
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, *, gate: Tensor | None = None) -> Tensor:
        x = x + self.shift if gate is None else x * gate
        return F.linear(torch.relu(x), self.weight)


def opaque_symbols(module: nn.Module) -> Any:
    from bittern.tracing import Symbol, SymInfo

    kinds = Symbol.CLType
    return SymInfo(
        kept_dims="other",
        width=Symbol(cl_type=kinds.INCOMING, elastic_dims={-1}, tensors={"weight": 1}, size=8),
        made=Symbol(cl_type=kinds.OUTGOING, elastic_dims={-1}, tensors={"weight": 0}, size=6),
    )


def broken_symbols(module: nn.Module) -> Any:
    raise KeyError("weight")


def rules(**hooks: Callable[[], Any]) -> Iterator[Toolkit]:
    with PluginHarness(hooks_module("sealing", **hooks)) as harness:
        yield harness.toolkit


def leaf(target: str) -> Callable[[], list[LeafRule]]:
    def register_trace_leaves() -> list[LeafRule]:
        return [LeafRule(target=target, reason="it is one fused kernel")]

    return register_trace_leaves


@pytest.fixture
def sealing() -> Iterator[Callable[..., Toolkit]]:
    open_harnesses: list[Iterator[Toolkit]] = []

    def make(target: str, symbols: str | None = None) -> Toolkit:
        hooks: dict[str, Callable[[], Any]] = {"register_trace_leaves": leaf(target)}
        if symbols is not None:
            hooks["register_symbols"] = lambda: [
                SymbolRule(target=target, symbols=f"{__name__}:{symbols}")
            ]
        opened = rules(**hooks)
        open_harnesses.append(opened)
        return next(opened)

    yield make
    for opened in open_harnesses:
        opened.close()


def members(trace: Any) -> set[frozenset[tuple[str, str, int]]]:
    return {frozenset((m.module, m.tensor, m.dim) for m in g.members) for g in trace.groups}


def test_symbols_of_a_sealed_layer_give_what_its_operators_would(
    sealing: Callable[..., Toolkit], toolkit: Toolkit
) -> None:
    net, x = Net(), torch.randn(2, 4)
    opened, sealed = toolkit.trace(net, x), sealing(LINEAR).trace(net, x)
    assert members(sealed) == members(opened) != set()
    assert sealed.shared_inputs == opened.shared_inputs == (("mid", "side"),)
    assert sealed.coverage.fraction == 1.0
    assert {node.op for node in sealed.flow.graph.nodes} >= {"module.Linear"}


def test_a_sealed_module_without_symbols_is_a_barrier_with_the_reason_of_its_rule(
    sealing: Callable[..., Toolkit],
) -> None:
    target = f"{Opaque.__module__}:Opaque"
    net = nn.Sequential(nn.Linear(4, 8), Opaque(), nn.Linear(6, 2))
    trace = sealing(target).trace(net, torch.randn(2, 4))
    assert trace.groups == ()
    assert "it is one fused kernel" in trace.coverage.barriers["1"]
    assert "it is one fused kernel" in trace.coverage.barriers["0"]


def test_what_no_symbol_speaks_of_is_fixed(sealing: Callable[..., Toolkit]) -> None:
    target = f"{Opaque.__module__}:Opaque"
    net = nn.Sequential(nn.Linear(4, 8), Opaque(), nn.Linear(6, 2))
    trace = sealing(target, "opaque_symbols").trace(net, torch.randn(2, 4))
    assert ("1", "weight", 1) in frozenset().union(*members(trace))
    assert not any(name == "shift" for group in members(trace) for _, name, _ in group)
    assert "no symbol of 1 speaks of it" in trace.explain("1.shift")


def test_a_tensor_that_comes_in_by_name_is_not_forgotten(sealing: Callable[..., Toolkit]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.opaque = nn.Linear(4, 8), nn.Linear(4, 8), Opaque()

        def forward(self, x: Tensor) -> Tensor:
            return self.opaque(self.one(x), gate=self.two(x))

    target = f"{Opaque.__module__}:Opaque"
    trace = sealing(target, "opaque_symbols").trace(Gated(), torch.randn(2, 4))
    assert not any(module == "two" for group in members(trace) for module, _, _ in group)
    assert "no symbol speaks of it" in trace.explain("two.weight")


def test_symbols_that_fail_are_a_barrier_that_names_the_plugin(
    sealing: Callable[..., Toolkit],
) -> None:
    target = f"{Opaque.__module__}:Opaque"
    net = nn.Sequential(nn.Linear(4, 8), Opaque(), nn.Linear(6, 2))
    trace = sealing(target, "broken_symbols").trace(net, torch.randn(2, 4))
    assert trace.groups == ()
    assert "sealing" in trace.coverage.barriers["1"]
