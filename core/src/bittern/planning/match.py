"""Which modules a recipe's pattern means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from bittern.config import MatchModel
from bittern.errors import RecipeError

__all__ = ["Matcher"]


SWEEPING = ("*", ".*", ".+")


def _last(pattern: str) -> str:
    """Return what a pattern says about the last part of a path."""
    dot = r"\." if pattern.startswith("re:") else "."
    return pattern.removeprefix("re:").rpartition(dot)[2]


class Matcher:
    """A compiled `MatchModel`.

    Args:
        match: The pattern.

    Raises:
        RecipeError: A regular expression is malformed.
    """

    def __init__(self, match: MatchModel) -> None:
        self.match = match
        self._regexes: dict[str, re.Pattern[str]] = {}
        for pattern in match.name:
            if pattern.startswith("re:"):
                try:
                    self._regexes[pattern] = re.compile(pattern[3:])
                except re.error as error:
                    raise RecipeError(f"{pattern!r} is not a regular expression: {error}") from None

    def __call__(
        self, path: str, cls: type, roles: Mapping[str, str], *, like: str | None = None
    ) -> bool:
        """Return whether the pattern means the module.

        Args:
            path: Dotted path of the module.
            cls: Its class (before conversion).
            roles: Module path to role.
            like: The class that its module rule says it is like.
        """
        match = self.match
        names = {like, *(base.__name__ for base in cls.__mro__)}
        if match.class_ and names.isdisjoint(match.class_):
            return False
        if match.role and roles.get(path) not in match.role:
            return False
        return not match.name or any(self.names(pattern, path) for pattern in match.name)

    def names(self, pattern: str, path: str) -> bool:
        """Return whether one name pattern means ``path``."""
        regex = self._regexes.get(pattern)
        return bool(regex.fullmatch(path)) if regex else fnmatchcase(path, pattern)

    def sweeps(self, path: str) -> bool:
        """Return whether only patterns that end in a bare ``*`` (or ``.*``) mean ``path``."""
        match = self.match
        if match.class_ or match.role:
            return False
        return all(_last(p) in SWEEPING for p in match.name if self.names(p, path))

    @property
    def by_role_only(self) -> bool:
        """Whether the pattern speaks of roles alone, which a model need not have."""
        return not self.match.name and not self.match.class_

    def __str__(self) -> str:
        return str(self.match)
