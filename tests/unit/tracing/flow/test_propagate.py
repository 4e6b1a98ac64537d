"""Rules of plugins: they are used, and what they do wrong is reported, never believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import PluginConflictError, PluginError
from bittern.records import OpRule
from bittern.testing import PluginHarness, hooks_module
from bittern.toolkit import Toolkit

HERE = f"{__name__}:"


@torch.library.custom_op("bittern_tests::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.flip(-1)


@turned.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("bittern_tests::filled", mutates_args=("x",))
def filled(x: Tensor) -> None:
    x.fill_(1)


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


# --- the rules of the plugins ---------------------------------------------------------------------


def same(node: Any, flow: Any) -> Any:
    return flow.of(node.tensor(0))


def named(node: Any, flow: Any, why: str) -> Any:
    flow.of(node.tensor(0))[-1].fix(why)
    return flow.of(node.tensor(0))


def too_few(node: Any, flow: Any) -> Any:
    return flow.of(node.tensor(0))[1:]


def failing(node: Any, flow: Any) -> Any:
    raise KeyError("no such thing")


def nothing(node: Any, flow: Any) -> Any:
    return None


def numbers(node: Any, flow: Any) -> Any:
    return node.out.shape


@pytest.fixture
def harness() -> Iterator[PluginHarness]:
    with PluginHarness() as made:
        yield made


def plugin(harness: PluginHarness, name: str, *rules: OpRule) -> Toolkit:
    def register_trace_ops() -> list[OpRule]:
        return list(rules)

    harness.add(hooks_module(name, register_trace_ops=register_trace_ops))
    return harness.toolkit


def rule(flow: str, op: str = "bittern_tests.turned.default", **options: Any) -> OpRule:
    priority = options.pop("priority", 0)
    return OpRule(op=op, flow=HERE + flow, options=options, priority=priority)


def trace(toolkit: Toolkit, between: Callable[[Tensor], Tensor] = turned) -> Any:
    return toolkit.trace(Net(between), (torch.ones(2, 3),))


def widths(trace: Any) -> set[int]:
    return {group.size for group in trace.groups}


def reason(trace: Any) -> str:
    assert list(trace.flow.barriers) == [""]
    return str(trace.flow.barriers[""])


# --- tests ----------------------------------------------------------------------------------------


def test_an_operator_without_a_rule_is_a_barrier_that_names_it(harness: PluginHarness) -> None:
    found = trace(harness.toolkit)
    assert reason(found) == "there is no rule for bittern_tests.turned.default"
    assert not widths(found)


def test_a_rule_of_a_plugin_lets_axes_through(harness: PluginHarness) -> None:
    found = trace(plugin(harness, "alpha", rule("same")))
    assert not found.flow.barriers
    assert widths(found) == {4}


def test_a_rule_for_all_overloads_counts_too(harness: PluginHarness) -> None:
    found = trace(plugin(harness, "alpha", rule("same", "bittern_tests.turned.*")))
    assert widths(found) == {4}


def test_options_reach_the_rule(harness: PluginHarness) -> None:
    found = trace(plugin(harness, "alpha", rule("named", why="it is turned around")))
    assert not found.flow.barriers
    assert not widths(found)
    assert "it is turned around" in found.explain("one")


def test_a_plugin_goes_before_core(harness: PluginHarness) -> None:
    toolkit = plugin(harness, "alpha", rule("named", "aten.relu.default", why="of the plugin"))
    assert "of the plugin" in trace(toolkit, torch.relu).explain("one")


@pytest.mark.parametrize(
    ("flow", "says"),
    [
        ("nothing", " says nothing about output 0"),
        ("too_few", " gives the shape [4], it is [2, 4]"),
        ("numbers", ": AttributeError: 'int' object has no attribute 'size'"),
        ("failing", ": KeyError: 'no such thing'"),
    ],
)
def test_a_wrong_rule_is_a_barrier_that_names_the_plugin(
    flow: str, says: str, harness: PluginHarness
) -> None:
    found = trace(plugin(harness, "alpha", rule(flow)))
    label = harness.record("alpha").label
    assert reason(found) == f"the rule of {label} for bittern_tests.turned.default{says}"
    assert not widths(found)


def test_two_rules_for_one_operator_are_a_conflict_of_both(harness: PluginHarness) -> None:
    plugin(harness, "alpha", rule("same"))
    toolkit = plugin(harness, "beta", rule("too_few"))
    with pytest.raises(PluginConflictError, match=r"alpha.*beta.*bittern_tests\.turned\.default"):
        trace(toolkit)


def test_a_conflict_about_an_operator_that_is_not_met_is_none(harness: PluginHarness) -> None:
    plugin(harness, "alpha", rule("same"))
    toolkit = plugin(harness, "beta", rule("too_few"))
    assert widths(trace(toolkit, torch.relu)) == {4}


def test_priority_decides_between_two(harness: PluginHarness) -> None:
    plugin(harness, "alpha", rule("same", priority=1))
    assert widths(trace(plugin(harness, "beta", rule("too_few")))) == {4}


def test_a_rule_that_is_not_there_names_the_plugin(harness: PluginHarness) -> None:
    with pytest.raises(PluginError, match="alpha"):
        trace(plugin(harness, "alpha", rule("missing")))


def test_what_writes_without_returning_is_a_barrier_whatever_its_rule(
    harness: PluginHarness,
) -> None:
    def between(x: Tensor) -> Tensor:
        y = x.clone()
        filled(y)
        return y

    toolkit = plugin(harness, "alpha", rule("same", "bittern_tests.filled.default"))
    assert "bittern_tests.filled.default writes without saying what" in reason(
        trace(toolkit, between)
    )
