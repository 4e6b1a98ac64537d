"""Groups identical blocks: 32 equal layers take one line, ``layers.{0..31}.mlp.up_proj``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

__all__ = ["collapse"]

V = TypeVar("V", bound=Hashable)

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def collapse(items: Iterable[tuple[str, V]]) -> list[tuple[str, V, int]]:
    """Merge paths that differ only in their block numbers and carry the same value.

    Args:
        items: ``(module path, value)`` in the model's order.

    Returns:
        ``(pattern, value, count)`` in order of first appearance. Numbers that vary within a group
        are shown as ``{0..31}``, or listed where they have holes.
    """
    groups: dict[tuple[str, V], list[tuple[int, ...]]] = {}
    for path, value in items:
        numbers = tuple(int(n) for n in _NUMBER.findall(path))
        groups.setdefault((_NUMBER.sub("#", path), value), []).append(numbers)
    merged = []
    for (shape, value), members in groups.items():
        columns = [sorted(set(column)) for column in zip(*members, strict=True)]
        text = shape
        for column in columns:
            text = text.replace("#", _span(column), 1)
        merged.append((text, value, len(members)))
    return merged


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    parts = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    return "{" + ",".join(parts) + "}"
