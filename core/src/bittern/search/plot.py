"""The Pareto front as a picture: an SVG made by hand, so that nothing has to be installed."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bittern.search.result import Point, SearchResult

__all__ = ["draw"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 80, 20, 40, 50
TICKS = 5
LABELS = {"bits": "bits per weight", "bytes": "bytes of the model", "seconds": "seconds"}


def draw(result: SearchResult) -> str:
    """Return the front of a search as an SVG document; each point tells what it is made of."""
    metric = next(iter(result.limits))
    points = result.front
    across = _Axis([getattr(p, metric) for p in points], LEFT, WIDTH - RIGHT)
    up = _Axis([0.0, *(p.score for p in points)], HEIGHT - BOTTOM, TOP)

    def at(point: Point) -> tuple[float, float]:
        return across(getattr(point, metric)), up(point.score)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    dots = [_dot(*at(point), point, chosen=point == result.chosen) for point in points]
    title = f"score ({result.method}) over {LABELS[metric]}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="{TOP - 16}" font-size="14">{escape(title)}</text>',
            *_ticks(across, up),
            f'<polyline points="{path}" fill="none" stroke="#3465a4" stroke-width="1.5"/>',
            *dots,
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{LABELS[metric]}</text>',
            "</svg>",
            "",
        ]
    )


class _Axis:
    """Maps values to pixels."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        return [self.low + (self.high - self.low) * i / (TICKS - 1) for i in range(TICKS)]


def _ticks(across: _Axis, up: _Axis) -> list[str]:
    bottom = HEIGHT - BOTTOM
    lines = []
    for value in across.ticks():
        x = across(value)
        lines.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:.3g}</text>')
    for value in up.ticks():
        y = up(value)
        lines.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    return lines


def _dot(x: float, y: float, point: Point, *, chosen: bool) -> str:
    made = ", ".join(f"{count} {name}" for name, count in sorted(point.counts.items()))
    text = f"{point.bits:.3f} bits, {point.bytes} bytes, score {point.score:.4g}: {made}"
    radius, color = (6, "#cc0000") if chosen else (3.5, "#3465a4")
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}">'
        f"<title>{escape(text)}</title></circle>"
    )
