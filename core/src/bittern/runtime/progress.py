"""How long work reports where it is; silent unless somebody listens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

__all__ = ["SILENT", "Progress"]

T = TypeVar("T")


class Progress(Protocol):
    """Something that shows progress; `bittern.report.progress` has one for terminals."""

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        """Yield ``items``, showing how many of ``total`` are done."""
        ...


class _Silent:
    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        yield from items


SILENT: Progress = _Silent()
