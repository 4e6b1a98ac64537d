"""The directive ``lifecycle`` draws the way of a model and the hooks along it.

Its lines are ``step | function | hook, hook, ...``, so that the page reads well without Sphinx, and
a test compares them with the calls of a real run. A step after an empty line stands apart. The
drawing is inline SVG in the theme's colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

WIDTH = 760
LEFT, BOX, TOP = 1, 118, 8  # the column of steps
FIRST, GAP, LINE = 160, 8, 32  # the hooks beside it
CHARACTER = 6.9  # width of a character of a hook's name


@dataclass(frozen=True)
class Step:
    """One step, the function that runs it, and the hooks it calls, in order.

    Attributes:
        name: What it is called.
        function: Which function does it.
        hooks: The hooks.
        apart: Whether no other step leads to it.
    """

    name: str
    function: str
    hooks: tuple[str, ...]
    apart: bool


def read(lines: Iterable[str]) -> list[Step]:
    """Return the steps that the lines of a directive describe."""
    steps: list[Step] = []
    apart = True
    for line in lines:
        if line.strip():
            name, function, hooks = (part.strip() for part in line.split("|"))
            steps.append(Step(name, function, tuple(h.strip() for h in hooks.split(",")), apart))
        apart = not line.strip()
    return steps


class Lifecycle(SphinxDirective):
    """Draws the steps in its content."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the drawing."""
        svg = draw(read(self.content))
        figure = f'<figure class="lifecycle">{svg}</figure>'
        return [nodes.raw("", figure, format="html")]


def draw(steps: list[Step]) -> str:
    """Return the drawing as SVG."""
    parts: list[str] = []
    y = float(TOP)
    for step in steps:
        rows = list(_rows(step.hooks))
        height = max(52, len(rows) * LINE + 8)
        if not step.apart:
            middle = LEFT + BOX / 2
            parts.append(f'<path class="arrow" d="M{middle} {y - 19}v13m-4 -5l4 5l4 -5"/>')
        parts.append(_box(step, y, height))
        top = y + (height - len(rows) * LINE) / 2
        for number, row in enumerate(rows):
            parts += [_pill(hook, x, top + number * LINE + 4) for hook, x in row]
        y += height + 24
    title = "the steps of a model and the hooks that each calls"
    return (
        f'<svg viewBox="0 0 {WIDTH} {y - 14:.0f}" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg>"
    )


def _rows(hooks: Iterable[str]) -> Iterator[list[tuple[str, float]]]:
    """Break the hooks into rows; yield each with the places of its pills."""
    row: list[tuple[str, float]] = []
    x = float(FIRST)
    for hook in hooks:
        if row and x + _wide(hook) > WIDTH - 1:
            yield row
            row, x = [], float(FIRST)
        row.append((hook, x))
        x += _wide(hook) + GAP
    yield row


def _wide(hook: str) -> float:
    return len(hook) * CHARACTER + 20


def _box(step: Step, y: float, height: float) -> str:
    middle, centre = LEFT + BOX / 2, y + height / 2
    return (
        f'<rect class="step" x="{LEFT}" y="{y}" width="{BOX}" height="{height}" rx="6"/>'
        f'<text class="name" x="{middle}" y="{centre - 3}">{escape(step.name)}</text>'
        f'<text class="function" x="{middle}" y="{centre + 14}">{escape(step.function)}</text>'
    )


def _pill(hook: str, x: float, y: float) -> str:
    wide = _wide(hook)
    kind = hook.partition("_")[0]
    return (
        f'<a href="hooks.html#{hook}"><rect class="hook {kind}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{wide:.1f}" height="24" rx="12"/>'
        f'<text class="hook" x="{x + wide / 2:.1f}" y="{y + 16:.1f}">{hook}</text></a>'
    )


def setup(app: Sphinx) -> dict[str, object]:
    """Register the directive."""
    app.add_directive("lifecycle", Lifecycle)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
