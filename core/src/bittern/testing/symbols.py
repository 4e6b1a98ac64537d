"""What rules about dimensions and graphs owe their users.

The tracer that uses these rules is a later issue: what is tested here is that the records are well
formed, that everything they name exists, and that a symbols function answers for live modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pytest
import torch
from torch import nn

from bittern.records import LeafRule, OpRule, SymbolRule
from bittern.registry import ClassTable, Match, resolve, target_of
from bittern.testing.base import Conformance, check, given_cases, named
from bittern.testing.compare import assert_bit_identical

__all__ = ["SymbolCase", "SymbolConformance", "TraceConformance"]


@dataclass(frozen=True)
class SymbolCase:
    """One module whose dimensions a plugin knows.

    Attributes:
        name: The test id.
        make: Builds the module.
    """

    name: str
    _: KW_ONLY
    make: Callable[[], nn.Module]


class SymbolConformance(Conformance):
    """Symbol rules: ``register_symbols`` names classes and functions that answer for them.

    The tracer that reads the answers is a later issue; their content is not judged yet.
    """

    def cases(self) -> Sequence[SymbolCase]:
        """Return a case for every class that has a rule."""
        return ()

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every case."""
        return {"case": named(given_cases(cls))}

    def test_symbol_targets_resolve(self) -> None:
        """Protects users from a rule that is silently dead since the framework moved a class."""
        self.subject().need_loaded()
        for rule in self._rules():
            _check_target(rule.target, self.subject().label)

    def test_symbol_functions_resolve(self) -> None:
        """Protects users from an ImportError in the middle of a trace."""
        self.subject().need_loaded()
        for rule in self._rules():
            function = resolve(rule.symbols, plugin=self.subject().label)
            check(callable(function), f"{rule.symbols} cannot be called")

    def test_every_symbol_rule_has_a_case(self) -> None:
        """Protects users from rules that nobody ever ran."""
        rules = self._rules()
        check(rules, "the plugin registers no symbols")
        classes = {target_of(base) for case in self._made() for base in type(case).__mro__}
        untested = [rule.target for rule in rules if rule.target not in classes]
        check(not untested, f"no case is a {', '.join(untested)}")

    def test_a_symbol_rule_takes_the_module(self, case: SymbolCase) -> None:
        """Protects users from a rule that its own class does not match."""
        self._match(case.make())

    def test_the_symbols_function_answers(self, case: SymbolCase) -> None:
        """Protects users from a trace that knows nothing of a class that has a rule.

        The function only looks: parameters, attributes and mode of the module stay as they are.
        """
        module = case.make()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        attributes = set(vars(module))
        function = resolve(self._match(module).symbols, plugin=self.subject().label)
        first, second = function(module), function(module)
        check(first is not None, "the function returns nothing")
        check(type(first) is type(second), "the function returns something else the second time")
        check(set(vars(module)) == attributes, "the function changes the module's attributes")
        after = {name: p.detach() for name, p in module.named_parameters()}
        assert_bit_identical(before, after, what="parameters")

    def _rules(self) -> list[SymbolRule]:
        return self.subject().call("register_symbols")

    def _made(self) -> list[nn.Module]:
        return [case.make() for _, case in self.parameters()["case"]]

    def _match(self, module: nn.Module) -> SymbolRule:
        self.subject().need_loaded()
        label = self.subject().label
        table: ClassTable[SymbolRule] = ClassTable([(r, label, False) for r in self._rules()])
        found = table.find(module)
        check(isinstance(found, Match), f"no rule takes a {type(module).__qualname__}")
        assert isinstance(found, Match)
        rule: SymbolRule = found.rule
        return rule


class TraceConformance(Conformance):
    """Trace rules: leaves and operators exist under the names that the plugin gives.

    The tracer that uses them is a later issue.
    """

    def test_leaf_targets_resolve(self) -> None:
        """Protects users from a tracer that enters what it must not, since a class was moved."""
        self._need(self._leaves())
        for rule in self._leaves():
            _check_target(rule.target, self.subject().label)

    def test_leaves_have_reasons(self) -> None:
        """Protects users from a hole in the coverage report without a word why."""
        self._need(self._leaves())
        silent = [rule.target for rule in self._leaves() if not rule.reason.strip()]
        check(not silent, f"no reason is given for {', '.join(silent)}")

    def test_leaves_do_not_repeat(self) -> None:
        """Protects users from two rules of which only one counts."""
        self._need(self._leaves())
        targets = [(rule.target, rule.priority) for rule in self._leaves()]
        twice = sorted({target for target, p in targets if targets.count((target, p)) > 1})
        check(not twice, f"several leaf rules for {', '.join(twice)}")

    def test_op_names_resolve(self) -> None:
        """Protects users from a rule for an operator that this torch does not have.

        A name is ``"namespace.op.overload"``, as ``"aten.linear.default"``.
        """
        self._need(self._ops())
        for rule in self._ops():
            parts = rule.op.split(".")
            check(len(parts) == 3, f'{rule.op!r} is no operator; write "namespace.op.overload"')
            found: Any = torch.ops
            for part in parts:
                found = getattr(found, part, None)
                check(found is not None, f"torch.ops has no {rule.op!r} ({part!r} is missing)")

    def test_op_flows_resolve(self) -> None:
        """Protects users from an ImportError in the middle of a trace."""
        self._need(self._ops())
        for rule in self._ops():
            function = resolve(rule.flow, plugin=self.subject().label)
            check(callable(function), f"{rule.flow} cannot be called")

    def test_ops_do_not_repeat(self) -> None:
        """Protects users from two rules of which only one counts."""
        self._need(self._ops())
        ops = [(rule.op, rule.priority) for rule in self._ops()]
        twice = sorted({op for op, p in ops if ops.count((op, p)) > 1})
        check(not twice, f"several rules for {', '.join(twice)}")

    def test_the_plugin_registers_trace_rules(self) -> None:
        """Protects users from a plugin whose trace rules got lost."""
        check(self._leaves() or self._ops(), "the plugin registers no leaf and no operator")

    def _leaves(self) -> list[LeafRule]:
        return self.subject().call("register_trace_leaves")

    def _ops(self) -> list[OpRule]:
        return self.subject().call("register_trace_ops")

    def _need(self, rules: Sequence[object]) -> None:
        self.subject().need_loaded()
        if not rules:
            pytest.skip("the plugin registers none")


def _check_target(target: str, label: str) -> None:
    cls = resolve(target, plugin=label)
    check(isinstance(cls, type), f"the target {target!r} is no class")
    own = target_of(cls)
    check(own == target, f"the target {target!r} names a re-export; write {own!r}")
