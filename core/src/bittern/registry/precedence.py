"""Which of several rules for one thing wins, whatever the order in which plugins were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from bittern.errors import PluginConflictError

__all__ = ["Ranked", "best"]


class Ranked(Protocol):
    """Anything with a priority."""

    @property
    def priority(self) -> int:
        """Higher wins."""
        ...


R = TypeVar("R", bound=Ranked)


def best(items: Sequence[tuple[R, str, bool]], claim: str) -> tuple[R, str]:
    """Return the rule of the highest priority, a plugin's before core's, and who registered it.

    Args:
        items: ``(rule, plugin label, is builtin)`` in any order, at least one.
        claim: What they claim, for the error: ``"claim torch.nn.modules.linear:Linear"``.

    Raises:
        PluginConflictError: Two of them are equal in that.
    """

    def rank(item: tuple[R, str, bool]) -> tuple[int, bool]:
        return item[0].priority, not item[2]

    top = max(rank(item) for item in items)
    first, *others = [item for item in items if rank(item) == top]
    if others:
        labels = " and ".join(sorted(item[1] for item in (first, *others)))
        raise PluginConflictError(
            f"{labels} both {claim} with priority {first[0].priority}",
            hint="block one of them with BITTERN_DISABLE_PLUGINS, or raise one rule's priority",
        )
    return first[0], first[1]
