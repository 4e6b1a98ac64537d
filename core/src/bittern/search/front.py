"""The best choice within limits, and the best ones for all others: the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping

from bittern.errors import PlanError
from bittern.search.result import Point
from bittern.search.solve import Table, lowest_and_highest, solve, total

__all__ = ["choose", "front_of"]


def choose(table: Table, limits: Mapping[str, float], *, elements: int, base: int) -> Point:
    """Return the choice with the least score within some limits.

    Args:
        table: The options of every group.
        limits: Upper bounds on ``bits`` per element, ``bytes`` of the model, ``seconds``.
        elements: Elements of all weights that count.
        base: Bytes of everything there is no choice about.

    Raises:
        PlanError: The limits cannot be kept; it names what can be reached.
    """
    budgets = {m: _budget(m, limit, elements, base) for m, limit in limits.items()}
    taken = solve(table, budgets)
    if taken is not None:
        return _point(table, taken, elements, base)
    ranges = {m: _reachable(table, m, elements, base) for m in limits}
    beyond = [m for m, limit in limits.items() if limit < ranges[m][0]]
    texts = [
        f"{m} between {_number(m, ranges[m][0])} and {_number(m, ranges[m][1])}"
        for m in beyond or limits
    ]
    asked = ", ".join(f"{m} <= {_number(m, limits[m])}" for m in beyond or limits)
    raise PlanError(
        f"no choice among the candidates keeps to {asked}"
        + ("" if beyond else " at once, though to each alone"),
        hint=f"reachable are {'; '.join(texts)}; raise the limit, or add smaller candidates",
    )


def front_of(
    table: Table, metric: str, *, elements: int, base: int, points: int, also: Point
) -> tuple[Point, ...]:
    """Return the best choices for limits from the lowest that can be kept to the highest.

    Args:
        table: The options of every group.
        metric: What is limited.
        elements: As for `choose`.
        base: As for `choose`.
        points: How many limits to try.
        also: A further point.

    Returns:
        Those that no other beats in both, the cheapest first.
    """
    low, high = lowest_and_highest(table, metric)
    found = [also]
    for step in range(points):
        budget = low + (high - low) * step / max(points - 1, 1)
        taken = solve(table, {metric: budget})
        if taken is not None:
            found.append(_point(table, taken, elements, base))
    found.sort(key=lambda point: (getattr(point, metric), point.score))
    front: list[Point] = []
    for point in found:
        if not front or point.score < front[-1].score:
            front.append(point)
    return tuple(front)


def _point(table: Table, taken: list[int], elements: int, base: int) -> Point:
    return Point(
        bits=total(table, taken, "bits") / elements,
        bytes=base + int(total(table, taken, "bytes")),
        seconds=total(table, taken, "seconds"),
        score=total(table, taken, "score"),
        choices=tuple(options[i].choice for options, i in zip(table, taken, strict=True)),
    )


def _budget(metric: str, limit: float, elements: int, base: int) -> float:
    if metric == "bits":
        return limit * elements * (1 + 1e-12)  # 4.5 bits are 4.5 bits, whatever floats say
    return limit - base if metric == "bytes" else limit


def _reachable(table: Table, metric: str, elements: int, base: int) -> tuple[float, float]:
    low, high = lowest_and_highest(table, metric)
    if metric == "bits":
        return low / elements, high / elements
    return (low + base, high + base) if metric == "bytes" else (low, high)


def _number(metric: str, value: float) -> str:
    return f"{value:.0f}" if metric == "bytes" else f"{value:.4g}"
