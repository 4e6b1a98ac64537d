"""Finds the rule that says how dimensions flow through an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bittern.records import OpRule
from bittern.registry.precedence import best
from bittern.registry.targets import resolve

__all__ = ["OpMatch", "OpTable", "op_names"]


def op_names(op: str) -> tuple[str, ...]:
    """Return the names under which an operator can have a rule, the closest first.

    Args:
        op: Qualified name, for example ``"aten.add_.Tensor"``.
    """
    packet = op.rpartition(".")[0]
    return op, f"{packet}.*", f"{packet.removesuffix('_')}.*"


@dataclass(frozen=True)
class OpMatch:
    """The rule of an operator, ready to be called.

    Attributes:
        flow: The function.
        options: Its options.
        plugin: Who registered it.
    """

    flow: Callable[..., Any]
    options: Mapping[str, object]
    plugin: str


class OpTable:
    """Operator rules: the exact overload, then ``"namespace.op.*"``, then the op not in place.

    Among rules of one name the higher priority wins, then a plugin over core; a tie is a conflict
    that is raised when the operator is met.

    Args:
        items: ``(rule, plugin label, is builtin)`` in any order.
    """

    def __init__(self, items: Iterable[tuple[OpRule, str, bool]]) -> None:
        self._rules: dict[str, list[tuple[OpRule, str, bool]]] = {}
        for item in items:
            self._rules.setdefault(item[0].op, []).append(item)
        self._found: dict[str, OpMatch | None] = {}

    def find(self, op: str) -> OpMatch | None:
        """Return the rule of an operator, ``None`` if there is none.

        Args:
            op: Qualified name, for example ``"aten.add_.Tensor"``.

        Raises:
            PluginConflictError: Two plugins registered it with one priority.
            PluginError: The rule's function does not resolve.
        """
        if op not in self._found:
            items = next((self._rules[n] for n in op_names(op) if n in self._rules), None)
            self._found[op] = None if items is None else self._match(items)
        return self._found[op]

    def knows(self, op: str) -> bool:
        """Return whether there is a rule for ``op``."""
        return self.find(op) is not None

    @staticmethod
    def _match(items: list[tuple[OpRule, str, bool]]) -> OpMatch:
        rule, plugin = best(items, f"have a rule for the operator {items[0][0].op}")
        return OpMatch(resolve(rule.flow, plugin=plugin), rule.options, plugin)
