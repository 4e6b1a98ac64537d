"""Finds the rule that says how dimensions flow through an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bittern.errors import PluginConflictError
from bittern.records import OpRule
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
            self._found[op] = None if items is None else self._best(items)
        return self._found[op]

    def knows(self, op: str) -> bool:
        """Return whether there is a rule for ``op``."""
        return self.find(op) is not None

    @staticmethod
    def _best(items: list[tuple[OpRule, str, bool]]) -> OpMatch:
        def rank(item: tuple[OpRule, str, bool]) -> tuple[int, bool]:
            return item[0].priority, not item[2]

        top = max(rank(item) for item in items)
        best = [item for item in items if rank(item) == top]
        if len(best) > 1:
            labels = " and ".join(sorted(item[1] for item in best))
            raise PluginConflictError(
                f"{labels} both have a rule for the operator {best[0][0].op}",
                hint="block one of them with BITTERN_DISABLE_PLUGINS, or raise one rule's priority",
            )
        rule, plugin, _ = best[0]
        return OpMatch(resolve(rule.flow, plugin=plugin), rule.options, plugin)
