"""A trace on a terminal: what belongs together, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bittern.report.blocks import collapse

if TYPE_CHECKING:
    from bittern.records import Group
    from bittern.tracing import Trace

__all__ = ["show_trace"]

_SHOWN = 4


def show_trace(trace: Trace, console: Console | None = None) -> None:
    """Show shared inputs, folds, groups, and what could not be analysed."""
    console = console if console is not None else Console()
    shared = [_relative(group) for group in trace.shared_inputs]
    _table(console, "shared inputs: read the very same tensor", shared)
    folds = []
    for fold in trace.foldable:
        where, names = _relative((fold.producer, *fold.consumers))
        producer, _, rest = names.partition(", ")
        folds.append((where, f"{producer} takes over an input scale of {rest}"))
    _table(console, "folds: a scale that can move into its producer", folds)
    groups = [_group(group) for group in trace.groups]
    _table(console, "groups: dimensions that change together", groups)
    coverage = trace.coverage
    _table(console, "not analysed", list(coverage.barriers.items()))
    console.print(
        f"{len(coverage.analysed):,} weight-bearing modules analysed ({coverage.fraction:.0%}); "
        f"{len(trace.groups):,} groups, {len(trace.shared_inputs):,} shared inputs, "
        f"{len(trace.foldable):,} folds"
    )


def _table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    if not rows:
        return
    table = Table(title=title)
    table.add_column("where", overflow="fold")
    table.add_column("n", justify="right")
    table.add_column("what", overflow="fold")
    for where, what, count in collapse(rows):
        table.add_row(escape(where) or "(model)", str(count), escape(what))
    console.print(table)


def _relative(names: Sequence[str]) -> tuple[str, str]:
    """Return what all names begin with, and the rest of each."""
    split = [name.split(".") for name in names]
    common = 0
    while all(len(s) > common + 1 and s[common] == split[0][common] for s in split):
        common += 1
    return ".".join(split[0][:common]), ", ".join(".".join(s[common:]) for s in split)


def _group(group: Group) -> tuple[str, str]:
    members = [f"{m.module}.{m.tensor}".lstrip(".") for m in group.members]
    where, rest = _relative(members)
    shown = [
        f"{name}[{member.dim}]" + (f" x{member.index.shape[1]}" * (member.index.shape[1] > 1))
        for name, member in zip(rest.split(", "), group.members, strict=True)
    ]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    notes = "" if group.sortable else "; not sortable"
    if group.normalized_by:
        notes += "; normalised"
    return where, f"{group.size}: {', '.join(shown[:_SHOWN])}{more}{notes}"
