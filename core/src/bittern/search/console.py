"""A search on a terminal (rich)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bittern.report.blocks import collapse
from bittern.report.console import human_bytes
from bittern.search.candidates import AS_IS

if TYPE_CHECKING:
    from bittern.search.result import Point, SearchResult

__all__ = ["show_search"]


def show_search(result: SearchResult, console: Console | None = None) -> None:
    """Show who got what, the front, and what people should know."""
    console = console if console is not None else Console()
    console.print(_choices(result))
    console.print(_front(result))
    point = result.chosen
    console.print(
        f"chosen: {point.bits:.3f} bits per weight, {human_bytes(point.bytes)}, "
        f"score {point.score:.4g} ({result.method})"
    )
    if result.unreached:
        some = ", ".join(result.unreached[:3]) + (", ..." if len(result.unreached) > 3 else "")
        console.print(
            f"[yellow]{len(result.unreached)} modules saw no data and stay as they are:[/] "
            f"{escape(some)}"
        )
    for note in result.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


def _choices(result: SearchResult) -> Table:
    table = Table(title=f"{len(result.decisions)} groups of modules")
    for column in ("modules", "n", "choice"):
        table.add_column(column, justify="right" if column == "n" else "left", overflow="fold")
    for pattern, choice, count in collapse([(d.name, d.choice) for d in result.decisions]):
        table.add_row(escape(pattern), str(count), choice if choice != AS_IS else "as it is")
    return table


def _front(result: SearchResult) -> Table:
    table = Table(title="the best choice for other limits")
    seconds = any(point.seconds for point in result.front)
    for column in ("", "bits", "size", *(["seconds"] if seconds else []), "score", "groups"):
        table.add_column(column, justify="left" if column == "groups" else "right")
    for point in result.front:
        table.add_row(*_cells(point, chosen=point == result.chosen, seconds=seconds))
    return table


def _cells(point: Point, *, chosen: bool, seconds: bool) -> list[str]:
    made = ", ".join(f"{count} {name}" for name, count in sorted(point.counts.items()))
    return [
        ">" if chosen else "",
        f"{point.bits:.3f}",
        human_bytes(point.bytes),
        *([f"{point.seconds:.4g}"] if seconds else []),
        f"{point.score:.4g}",
        escape(made),
    ]
