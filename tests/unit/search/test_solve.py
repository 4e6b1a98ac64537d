"""The integer program takes what trying everything would take."""

from __future__ import annotations

import itertools
import random

import pytest

from bittern.errors import PlanError
from bittern.search.front import choose, front_of
from bittern.search.solve import Option, lowest_and_highest, solve, total

Table = list[list[Option]]


def table(seed: int, groups: int = 5) -> Table:
    """Return groups of two to four options with random costs and scores."""
    draw = random.Random(seed)
    return [
        [
            Option(
                choice=f"c{i}",
                bits=draw.randint(1, 40) * 16,
                bytes=draw.randint(1, 10**9),
                seconds=draw.random() * 1e-3,
                score=draw.random() * 10 ** draw.randint(-6, 2),
            )
            for i in range(draw.randint(2, 4))
        ]
        for _ in range(groups)
    ]


def brute_force(options: Table, budgets: dict[str, float]) -> float | None:
    """Return the least score by trying every combination."""
    found = None
    for taken in itertools.product(*options):
        if all(sum(getattr(o, m) for o in taken) <= b for m, b in budgets.items()):
            score = sum(o.score for o in taken)
            found = score if found is None else min(found, score)
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("metrics", [("bits",), ("bytes",), ("seconds",), ("bits", "seconds")])
def test_no_combination_is_better(seed: int, metrics: tuple[str, ...]) -> None:
    options = table(seed)
    draw = random.Random(seed + 1000)
    budgets = {}
    for metric in metrics:
        low, high = lowest_and_highest(options, metric)
        budgets[metric] = low + (high - low) * draw.uniform(0.0, 0.8)

    taken = solve(options, budgets)

    best = brute_force(options, budgets)
    if best is None:
        assert taken is None
        return
    assert taken is not None
    assert total(options, taken, "score") == pytest.approx(best, rel=1e-9)
    for metric, budget in budgets.items():
        assert total(options, taken, metric) <= budget * (1 + 1e-9)


def test_a_budget_of_whole_numbers_is_kept_to_the_last_bit() -> None:
    """Costs as those of a model with 10^11 weights: the solver's tolerance is 10^5 bits there."""
    large = 10**12
    options = [
        [
            Option(choice="small", bits=4 * large, bytes=0, score=1.0 + i),
            Option(choice="large", bits=8 * large + 1, bytes=0, score=0.0),
        ]
        for i in range(6)
    ]
    exactly = 3 * (8 * large + 1) + 3 * 4 * large

    fits = solve(options, {"bits": exactly})
    misses = solve(options, {"bits": exactly - 1})

    assert fits == [0, 0, 0, 1, 1, 1]
    assert misses is not None
    assert sum(misses) == 2


def test_the_solver_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS of scipy 1.17 leaves lines of debugging for some programs, this one among them."""
    for seed in (12, 31, 40):
        draw = random.Random(seed)
        options = [
            [
                Option(choice="a", bits=int(n * 4.5) + 32, bytes=0, score=draw.random()),
                Option(choice="b", bits=n * 8 + 32, bytes=0, score=draw.random() / 10),
                Option(choice="none", bits=n * 16, bytes=0),
            ]
            for n in draw.choices([147456, 344064, 393216, 786432], k=60)
        ]
        low, high = lowest_and_highest(options, "bits")
        assert solve(options, {"bits": low + (high - low) * draw.random()}) is not None
    assert capfd.readouterr() == ("", "")


def test_tiny_scores_still_decide() -> None:
    options = [
        [Option(choice="a", bits=1, bytes=0, score=1e-9 * i), Option(choice="b", bits=2, bytes=0)]
        for i in (1, 3, 2)
    ]
    assert solve(options, {"bits": 4}) == [0, 1, 0]


def test_what_cannot_be_kept_names_what_can_be_reached() -> None:
    options = [
        [Option(choice="a", bits=40, bytes=5), Option(choice="none", bits=160, bytes=20)]
    ] * 2
    with pytest.raises(PlanError, match=r"keeps to bits <= 3\.5") as caught:
        choose(options, {"bits": 3.5}, elements=20, base=100)
    assert "bits between 4 and 16" in str(caught.value.hint)

    with pytest.raises(PlanError, match="keeps to bytes <= 109") as caught:
        choose(options, {"bytes": 109}, elements=20, base=100)
    assert "bytes between 110 and 140" in str(caught.value.hint)


def test_limits_that_exclude_each_other_are_named_as_such() -> None:
    options = [
        [
            Option(choice="slow", bits=4, bytes=0, seconds=2.0),
            Option(choice="fast", bits=8, bytes=0, seconds=1.0),
        ]
    ]
    with pytest.raises(PlanError, match="at once"):
        choose(options, {"bits": 5.0, "seconds": 1.5}, elements=1, base=0)


def test_exactly_the_lowest_number_of_bits_can_be_asked_for() -> None:
    """4.50244140625 bits and their like are no round numbers."""
    options = [
        [Option(choice="a", bits=bits, bytes=0), Option(choice="b", bits=9 * bits, bytes=0)]
        for bits in (4713, 777, 31)
    ]
    elements = 1237
    lowest = (4713 + 777 + 31) / elements
    assert choose(options, {"bits": lowest}, elements=elements, base=0).bits == lowest


@pytest.mark.parametrize("seed", range(4))
def test_the_front_holds_the_best_for_every_limit_it_shows(seed: int) -> None:
    options = table(seed, groups=4)
    chosen = choose(options, {"bits": 1e9}, elements=1, base=0)

    front = front_of(options, "bits", elements=1, base=0, points=15, also=chosen)

    assert len(front) > 2
    assert [p.bits for p in front] == sorted({p.bits for p in front})
    assert [p.score for p in front] == sorted({p.score for p in front}, reverse=True)
    for point in front:
        assert point.score == pytest.approx(brute_force(options, {"bits": point.bits}), rel=1e-9)
    assert front[0].bits == lowest_and_highest(options, "bits")[0]
    assert front[-1] == chosen
