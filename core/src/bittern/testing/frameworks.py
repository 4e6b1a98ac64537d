"""A framework that exists for one test, for rules with lazy string targets."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bittern.testing.site import Site

__all__ = ["FakeFramework", "fake_framework"]


@dataclass(frozen=True)
class FakeFramework:
    """A throw-away package.

    Attributes:
        name: Its import name.
        path: The folder on ``sys.path`` that holds it.
    """

    name: str
    path: Path

    @property
    def imported(self) -> bool:
        """Whether anybody has imported it yet."""
        return self.name in sys.modules


@contextmanager
def fake_framework(
    name: str, source: str | Mapping[str, str] = "", *, version: str | None = None
) -> Iterator[FakeFramework]:
    """Make an importable package that is gone after the block.

    Args:
        name: Its import name.
        source: The content of its ``__init__.py``, or file names with their sources.
        version: With one, it is an installed distribution, so that ``target`` extras see it.

    Raises:
        ValueError: A real module has the name.
    """
    if name in sys.modules:
        raise ValueError(f"there is a module {name!r} already; choose another name")
    site = Site()
    try:
        site.add_package(name, {"__init__.py": source} if isinstance(source, str) else source)
        if version is not None:
            site.add_distribution(name, version, top_level=name)
        yield FakeFramework(name, site.path)
    finally:
        site.close()
