"""Tables of named records, with provenance and conflict errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from bittern.errors import BitternError, PluginConflictError

__all__ = ["Named", "NamedTable", "nearest"]


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The name it is looked up by."""
        ...


T = TypeVar("T", bound=Named)


def nearest(word: str, names: Iterable[str], *, count: int = 1) -> list[str]:
    """Return the ``count`` names most like ``word``, the best first."""
    ranked = sorted(
        names,
        key=lambda name: -difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio(),
    )
    return ranked[:count]


class NamedTable(Generic[T]):
    """Records of one kind by name.

    A plugin's record goes before core's of the same name; two plugins with one name are a conflict
    that is raised when the name is used, so that everybody else can work on.

    Args:
        kind: What the records are, for errors ("format").
        items: ``(record, plugin label, is builtin)`` in any order.
        error: The error class for an unknown name.
    """

    def __init__(
        self, kind: str, items: Iterable[tuple[T, str, bool]], *, error: type[BitternError]
    ) -> None:
        self._kind = kind
        self._error = error
        self._items: dict[str, list[tuple[T, str, bool]]] = {}
        for item in items:
            self._items.setdefault(item[0].name, []).append(item)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def get(self, name: str) -> T:
        """Return the record called ``name``.

        Raises:
            BitternError: Of the table's error class: no such name, with the nearest one.
            PluginConflictError: Two plugins registered the name.
        """
        return self._pick(name)[0]

    def plugin(self, name: str) -> str:
        """Return the label of the plugin whose record ``get(name)`` returns."""
        return self._pick(name)[1]

    def _pick(self, name: str) -> tuple[T, str, bool]:
        items = self._items.get(name)
        if not items:
            near = nearest(name, self._items)
            hint = (
                f"did you mean {near[0]!r}? known: {', '.join(self)}" if near else "none is known"
            )
            raise self._error(f"unknown {self._kind} {name!r}", hint=hint)
        plugins = [item for item in items if not item[2]] or items
        if len(plugins) > 1:
            labels = " and ".join(sorted(item[1] for item in plugins))
            raise PluginConflictError(
                f"{labels} both register the {self._kind} {name!r}",
                hint="block one of them with BITTERN_DISABLE_PLUGINS",
            )
        return plugins[0]
