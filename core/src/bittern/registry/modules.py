"""Finds the rule for a live module: string targets matched along the MRO.

Precedence never depends on the order in which plugins were loaded: the first class of the MRO that
has an applicable rule wins (so the exact class before its bases), then the higher ``priority``,
then a plugin before core; a tie between two plugins is a `PluginConflictError`. Rules with the
target ``"*"`` are pure predicates and come last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from bittern.errors import PluginError
from bittern.registry.precedence import best
from bittern.registry.targets import target_of, why_dead

__all__ = ["ANY", "ClassTable", "Match", "NoMatch"]

ANY = "*"


class ClassRule(Protocol):
    """What a rule about module classes has."""

    @property
    def target(self) -> str: ...

    @property
    def subclass_forward(self) -> bool: ...

    @property
    def priority(self) -> int: ...


R = TypeVar("R", bound=ClassRule)


@dataclass(frozen=True)
class Match(Generic[R]):
    """The rule that takes a module, and who registered it."""

    rule: R
    plugin: str


@dataclass(frozen=True)
class NoMatch:
    """Why no rule takes a module; ``reason`` is empty when no rule speaks about its classes."""

    reason: str = ""


class ClassTable(Generic[R]):
    """Rules about module classes.

    Args:
        items: ``(rule, plugin label, is builtin)`` in any order.
    """

    def __init__(self, items: Iterable[tuple[R, str, bool]]) -> None:
        self._by_target: dict[str, list[tuple[R, str, bool]]] = {}
        for item in items:
            self._by_target.setdefault(item[0].target, []).append(item)

    def extended(self, items: Iterable[tuple[R, str, bool]]) -> ClassTable[R]:
        """Return a table with further rules; this one stays as it is."""
        every = [item for group in self._by_target.values() for item in group]
        return ClassTable([*every, *items])

    def __iter__(self) -> Any:
        for group in self._by_target.values():
            for rule, plugin, _ in group:
                yield rule, plugin

    def dead(self) -> list[str]:
        """Return a warning for every plugin's rule that no class can match.

        Only targets in modules that are imported are judged, so that asking costs nothing; a rule
        for a framework that this process does not use is nobody's concern.
        """
        return [
            f"the rule of {plugin} for {target} matches nothing: {why}; the plugin and its "
            "framework do not fit, update one of them"
            for target, group in self._by_target.items()
            if (why := why_dead(target))
            for _, plugin, builtin in group
            if not builtin
        ]

    def find(self, module: object, cls: type | None = None) -> Match[R] | NoMatch:
        """Return the rule for ``module``, or why there is none.

        Args:
            module: The live module.
            cls: Its class, where that is not ``type(module)`` (an already converted module).

        Raises:
            PluginConflictError: Two plugins claim the same class with the same precedence.
        """
        own = cls if cls is not None else type(module)
        refused = because = ""
        for base in own.__mro__:
            candidates = self._by_target.get(target_of(base))
            if not candidates:
                continue
            same_forward = getattr(own, "forward", None) is getattr(base, "forward", None)
            applicable = []
            for item in candidates:
                rule = item[0]
                if base is not own and not same_forward and not rule.subclass_forward:
                    refused = refused or (
                        f"{own.__qualname__} overrides forward of {base.__qualname__}, "
                        f"and the rule of {item[1]} does not say that it still holds "
                        f"(a rule for {target_of(own)}, or subclass_forward=True, would)"
                    )
                    continue
                answer = _holds(item[0], item[1], module, bare=True)
                if answer is True:
                    applicable.append(item)
                elif answer:
                    because = because or answer
                else:
                    refused = (
                        refused or f"the rule of {item[1]} for {base.__qualname__} declined it"
                    )
            if applicable:
                return Match(*best(applicable, f"claim {target_of(base)}"))
        predicates = [
            item
            for item in self._by_target.get(ANY, [])
            if _holds(item[0], item[1], module, bare=False) is True
        ]
        if predicates:
            return Match(*best(predicates, f"claim {target_of(own)}"))
        return NoMatch(because or refused)


def _holds(rule: ClassRule, plugin: str, module: object, *, bare: bool) -> bool | str:
    """Return what a rule's predicate says of a module; ``bare`` where it has none.

    A sentence is a no, and says why.

    Raises:
        PluginError: The predicate raises.
    """
    predicate = getattr(rule, "predicate", None)
    if predicate is None:
        return bare
    try:
        answer = predicate(module)
        return answer if isinstance(answer, str) else bool(answer)
    except Exception as error:
        raise PluginError(
            f"plugin {plugin}: the predicate of its rule for {rule.target} failed on a "
            f"{type(module).__qualname__}: {type(error).__name__}: {error}",
            hint="let the predicate return False for modules that it does not know",
        ) from error
