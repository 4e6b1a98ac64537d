"""The choice of a recipe for every group, as an integer linear program for a real solver.

One variable per group and option, 1 for the option that is taken; exactly one per group. The sum of
the scores is minimized under upper bounds on sums of costs: a multiple-choice knapsack.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from bittern.errors import PlanError

__all__ = ["METRICS", "Option", "lowest_and_highest", "solve", "total"]

METRICS = ("bits", "bytes", "seconds")
TRIES = 50
SLACK = 1e-9  # relative; of budgets in seconds, which are no whole numbers


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice for one group: what it costs, and what it does to the model.

    Attributes:
        choice: Name of the candidate, or ``"none"``.
        bits: Stored bits of the group's weights.
        bytes: What the group adds to the model's bytes.
        seconds: Its measured latency.
        score: How much the model suffers; lower is better.
    """

    choice: str
    bits: int
    bytes: int
    seconds: float = 0.0
    score: float = 0.0

    def cost(self, metric: str) -> float:
        """Return one of the costs."""
        value: float = getattr(self, metric)
        return value


Table = Sequence[Sequence[Option]]


def total(table: Table, taken: Sequence[int], metric: str) -> float:
    """Return the cost of a selection, or with ``"score"`` what it does to the model."""
    return sum(options[i].cost(metric) for options, i in zip(table, taken, strict=True))


def lowest_and_highest(table: Table, metric: str) -> tuple[float, float]:
    """Return the smallest and the largest total cost there is."""
    costs = [[option.cost(metric) for option in options] for options in table]
    return sum(map(min, costs)), sum(map(max, costs))


def solve(table: Table, budgets: Mapping[str, float]) -> list[int] | None:
    """Take one option per group so that the scores' sum is least.

    Args:
        table: The options of every group.
        budgets: Upper bounds on total costs, by name of the cost.

    Returns:
        The index of the option of every group; ``None`` where the bounds cannot hold together.

    Raises:
        PlanError: scipy is not installed, or the solver gives up.
    """
    if not table:
        return []
    if any(lowest_and_highest(table, m)[0] > _with_slack(m, b) for m, b in budgets.items()):
        return None
    bounds = {metric: _bound(table, metric, budget) for metric, budget in budgets.items()}
    for _ in range(TRIES):
        taken = _milp(table, list(bounds.values()))
        if taken is None:
            return None
        over = {m: total(table, taken, m) - _with_slack(m, b) for m, b in budgets.items()}
        if all(excess <= 0 for excess in over.values()):
            return taken
        # The solver's tolerance let a bound through: ask for that much less, and once more.
        bounds = {m: b.tightened(over[m]) if over[m] > 0 else b for m, b in bounds.items()}
    raise PlanError("the solver does not keep to the bounds", hint="choose slightly lower ones")


def _with_slack(metric: str, budget: float) -> float:
    return budget * (1 + SLACK) if metric == "seconds" else budget


@dataclass(frozen=True)
class _Row:
    """One bound of the program: ``coefficients . x <= limit``."""

    coefficients: np.ndarray
    limit: float
    unit: float

    def tightened(self, excess: float) -> _Row:
        return replace(self, limit=self.limit - max(excess / self.unit, 1e-6))


def _bound(table: Table, metric: str, budget: float) -> _Row:
    """Return a bound on what exceeds the cheapest options, with no coefficient above 1.

    The solver's tolerance is absolute. Costs that are whole numbers are multiples of a common
    divisor, and half of that on top of the limit lets nothing else through, and nothing be lost to
    rounding.
    """
    cheapest = [min(option.cost(metric) for option in options) for options in table]
    above = [
        option.cost(metric) - least
        for options, least in zip(table, cheapest, strict=True)
        for option in options
    ]
    whole = [int(value) for value in above]
    room = budget - sum(cheapest)
    if whole == above and any(whole):
        divisor = reduce(math.gcd, whole)
        room = (math.floor(room) // divisor + 0.5) * divisor
    unit = max(above) or 1.0
    return _Row(np.array(above) / unit, room / unit, unit)


def _milp(table: Table, rows: Sequence[_Row]) -> list[int] | None:
    """Solve one program with HiGHS."""
    try:
        from scipy.optimize import (  # type: ignore[import-untyped]
            Bounds,
            LinearConstraint,
            milp,
        )
        from scipy.sparse import csr_array  # type: ignore[import-untyped]
    except ImportError as error:
        raise PlanError(
            "a search needs scipy, which is not installed", hint="pip install 'bittern[search]'"
        ) from error
    sizes = [len(options) for options in table]
    scores = np.array([option.score for options in table for option in options])
    # The solver stops within 1e-6 of the optimum, so that has to be little.
    largest = float(np.abs(scores).max())
    scale = 1e6 / largest if largest > 0 else 1.0
    owner = np.repeat(np.arange(len(table)), sizes)
    columns = np.arange(len(scores))
    one_each = csr_array((np.ones(len(scores)), (owner, columns)), (len(table), len(scores)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(row.coefficients[None], -np.inf, row.limit) for row in rows]
    with _quiet():
        found = milp(
            scores * scale,
            integrality=np.ones(len(scores)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 1e-9},
        )
    if found.status == 2:
        return None
    if found.x is None:
        raise PlanError(
            f"the solver gave up: {found.message}", hint="choose other bounds, or fewer candidates"
        )
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return [int(np.argmax(found.x[s : s + n])) for s, n in zip(starts, sizes, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard output clean: some versions of HiGHS leave a line of debugging there.

    It writes past Python, to the file descriptor, whatever it is told about messages; and what
    ``--json`` prints has to be one object.
    """
    try:
        kept = os.dup(1)
    except OSError:  # a process without standard output
        yield
        return
    try:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
