"""Which rule takes a module: MRO, forward, predicates, priority, plugin over core, conflicts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
from torch import nn

from bittern.errors import PluginConflictError
from bittern.records import ModuleRule
from bittern.registry import ANY, ClassTable, Match, NoMatch, target_of
from bittern.toolkit import Toolkit

Item = tuple[ModuleRule, str, bool]


class Base(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class Same(Base):
    """No forward of its own."""


class Other(Base):
    def forward(self, x: Any) -> Any:
        return -x


class BelowOther(Other):
    """No forward of its own, but not Base's either."""


class Mixin:
    """Beside, in the MRO."""


class Both(Mixin, Base):
    """Two bases, one forward."""


def rule(target: type | str, plugin: str = "p", *, core: bool = False, **options: Any) -> Item:
    name = target if isinstance(target, str) else target_of(target)
    return ModuleRule(target=name, quantized=f"q:{plugin}", **options), plugin, core


def always(module: nn.Module) -> bool:
    return True


def never(module: nn.Module) -> bool:
    return False


def winner(items: list[Item], module: nn.Module) -> str | None:
    """Return who wins, whatever the order in which the rules were registered."""
    found = {
        match.plugin if isinstance(match := ClassTable(order).find(module), Match) else None
        for order in permutations(items)
    }
    assert len(found) == 1, f"the order decides: {found}"
    return found.pop()


@pytest.mark.parametrize(
    ("items", "module", "expected"),
    [
        # the class itself, then its bases in MRO order
        ([rule(Base, "base"), rule(Same, "same")], Same(), "same"),
        ([rule(Base, "base"), rule(Same, "same")], Base(), "base"),
        ([rule(Base, "base")], Same(), "base"),
        ([rule(Same, "same")], Base(), None),
        ([rule(Other, "other"), rule(Base, "base", subclass_forward=True)], BelowOther(), "other"),
        ([rule(nn.Module, "root", subclass_forward=True), rule(Base, "base")], Same(), "base"),
        ([rule(Mixin, "mixin", subclass_forward=True), rule(Base, "base")], Both(), "mixin"),
        # a closer class goes before any priority, and before plugin over core
        ([rule(Base, "base", priority=99), rule(Same, "same")], Same(), "same"),
        ([rule(Base, "base"), rule(Same, "same", core=True)], Same(), "same"),
        # another forward needs a rule that says so
        ([rule(Base, "base")], Other(), None),
        ([rule(Base, "base", subclass_forward=True)], Other(), "base"),
        ([rule(Base, "base")], BelowOther(), None),
        ([rule(Other, "other")], BelowOther(), "other"),
        ([rule(Base, "strict"), rule(Base, "loose", subclass_forward=True)], Other(), "loose"),
        # priority, then plugin over core
        ([rule(Base, "low"), rule(Base, "high", priority=1)], Base(), "high"),
        ([rule(Base, "plugin"), rule(Base, "core", core=True)], Base(), "plugin"),
        ([rule(Base, "plugin"), rule(Base, "core", core=True, priority=1)], Base(), "core"),
        # predicates
        ([rule(Base, "no", predicate=never), rule(Base, "yes", core=True)], Base(), "yes"),
        ([rule(Same, "no", predicate=never), rule(Base, "base")], Same(), "base"),
        ([rule(Base, "no", predicate=never)], Base(), None),
        ([rule(Base, "mode", predicate=lambda m: m.training)], Base(), "mode"),
        # "*" comes last, and needs a predicate
        ([rule(ANY, "any", predicate=always, priority=99), rule(Base, "base")], Same(), "base"),
        ([rule(ANY, "any", predicate=always), rule(Base, "base")], Other(), "any"),
        ([rule(ANY, "any")], Base(), None),
        ([rule(ANY, "any", predicate=never)], Base(), None),
        (
            [rule(ANY, "a", predicate=always), rule(ANY, "b", predicate=always, priority=1)],
            Base(),
            "b",
        ),
        # nobody
        ([], Base(), None),
        ([rule("some.where:Base", "elsewhere")], Base(), None),
    ],
)
def test_precedence(items: list[Item], module: nn.Module, expected: str | None) -> None:
    assert winner(items, module) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (rule(Base, "alpha 1.0"), rule(Base, "beta 2.0")),
        (rule(Base, "alpha 1.0", priority=3), rule(Base, "beta 2.0", priority=3)),
        (
            rule(ANY, "alpha 1.0", predicate=always),
            rule(ANY, "beta 2.0", predicate=always),
        ),
    ],
)
def test_a_tie_of_two_plugins_names_both_and_the_way_out(first: Item, second: Item) -> None:
    for order in ([first, second], [second, first]):
        with pytest.raises(PluginConflictError) as caught:
            ClassTable(order).find(Base())
        priority = first[0].priority
        assert caught.value.what == (
            f"alpha 1.0 and beta 2.0 both claim {target_of(Base)} with priority {priority}"
        )
        assert "priority" in (caught.value.hint or "")


def test_a_tie_harms_nobody_else() -> None:
    table = ClassTable([rule(Other, "a"), rule(Other, "b"), rule(Same, "same")])
    assert isinstance(table.find(Same()), Match)


def test_a_tie_is_decided_by_a_closer_class() -> None:
    assert winner([rule(Base, "a"), rule(Base, "b"), rule(Same, "same")], Same()) == "same"


def test_a_refusal_says_why() -> None:
    strict = ClassTable([rule(Base, "alpha 1.0")]).find(Other())
    declined = ClassTable([rule(Base, "alpha 1.0", predicate=never)]).find(Base())
    nobody = ClassTable([]).find(Base())

    assert isinstance(strict, NoMatch)
    assert strict.reason == (
        "Other overrides forward of Base, "
        "and the rule of alpha 1.0 does not say that it still holds "
        f"(a rule for {target_of(Other)}, or subclass_forward=True, would)"
    )
    assert declined == NoMatch("the rule of alpha 1.0 for Base declined it")
    assert nobody == NoMatch("")


def test_a_sentence_of_a_predicate_is_a_no_and_the_reason() -> None:
    def sentence(module: nn.Module) -> bool | str:
        return "its heart is not in it"

    picky = rule(Base, "picky", subclass_forward=True, predicate=sentence)
    for items in permutations([picky, rule(Base, "strict")]):
        assert ClassTable(items).find(Other()) == NoMatch("its heart is not in it")
    assert isinstance(ClassTable([picky, rule(Base, "plain")]).find(Base()), Match)
    everywhere = rule(ANY, "any", predicate=sentence)
    assert ClassTable([everywhere]).find(Base()) == NoMatch("")


def test_a_module_can_be_looked_up_as_another_class() -> None:
    table = ClassTable([rule(Base, "base")])

    assert isinstance(table.find(Other(), Base), Match)
    assert isinstance(table.find(Base(), Other), NoMatch)


def test_a_longer_table_leaves_the_shorter_one_as_it_was() -> None:
    short = ClassTable([rule(Base, "base")])
    long = short.extended([rule(Other, "other"), rule(Base, "core", core=True)])

    assert isinstance(short.find(Other()), NoMatch)
    assert isinstance(long.find(Other()), Match)
    assert [plugin for _, plugin in short] == ["base"]
    assert sorted(plugin for _, plugin in long) == ["base", "core", "other"]
    found = long.find(Base())
    assert isinstance(found, Match)
    assert found.plugin == "base"


def test_a_rule_without_a_class_refuses_with_its_reason(
    make_plugin: Callable[..., Any], toolkit_with: Callable[..., Toolkit]
) -> None:
    def register_modules() -> list[ModuleRule]:
        why = "its weight is read by a fused kernel"
        return [ModuleRule(target="torch.nn.modules.linear:Linear", quantized=None, reason=why)]

    toolkit = toolkit_with(make_plugin("alpha", register_modules=register_modules))
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    plan = toolkit.plan(model, "int8")

    assert plan.modules == ("1",)
    assert plan.skipped == {"0": "its weight is read by a fused kernel"}


def test_rules_of_a_live_model_are_added_for_that_model_only(
    make_plugin: Callable[..., Any], toolkit_with: Callable[..., Toolkit]
) -> None:
    from bittern.builtin.modules import INPUT, OUTPUT, WEIGHT

    class Remote(nn.Linear):
        def forward(self, input: Any) -> Any:
            return input @ self.weight.abs().T

    def discover_modules(model: nn.Module) -> list[ModuleRule]:
        if not any(isinstance(m, Remote) for m in model.modules()):
            return []
        target, quantized = target_of(Remote), "bittern.nn.linear:QuantLinear"
        return [ModuleRule(target=target, quantized=quantized, slots=(WEIGHT, INPUT, OUTPUT))]

    toolkit = toolkit_with(make_plugin("alpha", discover_modules=discover_modules))
    plan = toolkit.plan(nn.Sequential(Remote(4, 4)), "int8")

    assert {entry.plugin for entry in plan.entries} == {"bittern-alpha 1.0"}
    assert isinstance(toolkit.registry.modules.find(Remote(4, 4)), NoMatch)


def test_targets_name_the_defining_module_and_the_qualified_name() -> None:
    class Inner(nn.Module):
        pass

    assert target_of(nn.Linear) == "torch.nn.modules.linear:Linear"
    assert target_of(Inner).endswith(
        ":test_targets_name_the_defining_module_and_the_qualified_name.<locals>.Inner"
    )
