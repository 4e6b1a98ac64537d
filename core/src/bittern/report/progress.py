"""Progress on a terminal; plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["ConsoleProgress"]

T = TypeVar("T")
EVERY = 10.0  # seconds between plain lines


class ConsoleProgress:
    """Shows steps as they go, with the time left.

    Args:
        console: Where to; a pipe or a CI log gets a line every ten seconds instead of a bar.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` and show how many are done."""
        if self._console.is_terminal:
            yield from self._bar(items, what, total)
        else:
            yield from self._lines(items, what, total)

    def _bar(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield from progress.track(items, total=total, description=what)

    def _lines(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        start = last = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - last >= EVERY:
                last = now
                left = f", {(now - start) / done * (total - done):.0f} s left" if total else ""
                of = f"/{total}" if total else ""
                self._console.print(f"{what}: {done}{of}{left}")
