"""What a search returns: the choices, what they cost, and what else could have been chosen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bittern.report import Result
from bittern.search.candidates import AS_IS
from bittern.search.rules import SlotsData, recipe_of
from bittern.search.solve import Option

__all__ = ["Decision", "Point", "SearchResult"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided about one group of modules.

    Attributes:
        name: The group in one word.
        members: Paths of its modules.
        elements: Elements of its weights.
        options: What could be chosen, with its cost and score.
        choice: What was chosen: a candidate's name, or ``"none"``.
    """

    name: str
    members: tuple[str, ...]
    elements: int
    options: tuple[Option, ...]
    choice: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to choose for all groups.

    Attributes:
        bits: Mean stored bits per element of the weights that count, scales included.
        bytes: Bytes of the whole model.
        seconds: Sum of the measured latencies; 0 where none were given.
        score: Sum of the scores; lower is better.
        choices: Name of the choice of every group, in the order of the groups.
    """

    bits: float
    bytes: int
    seconds: float
    score: float
    choices: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many groups got each choice."""
        return dict(Counter(self.choices))


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `bittern.auto_quantize` found.

    Attributes:
        method: How sensitivity was measured.
        limits: What was asked for: upper bounds on ``bits``, ``bytes``, ``seconds``.
        chosen: The best choice within the limits.
        front: The best choice for other limits, from the smallest to the largest.
        decisions: Group by group, in the model's order.
        algorithm: The calibration steps.
        specs: Candidate to module to what a recipe says of the module's slots.
        fixed: What all candidates say alike of modules without weights.
        unreached: Modules that saw no data: nobody knows what quantizing them would cost, so their
            groups stay as they are.
        notes: What people should know.
        quantized: The model quantized by it, with its report; ``None`` where it was only searched.
    """

    method: str
    limits: Mapping[str, float]
    chosen: Point
    front: tuple[Point, ...]
    decisions: tuple[Decision, ...]
    algorithm: tuple[tuple[str, Mapping[str, object]], ...]
    specs: Mapping[str, Mapping[str, SlotsData]] = field(repr=False)
    fixed: Mapping[str, SlotsData] = field(default_factory=dict, repr=False)
    unreached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quantized: Result | None = field(default=None, repr=False)

    @property
    def bits(self) -> float:
        """Mean stored bits per element of the weights that count, scales included."""
        return self.chosen.bits

    @property
    def bytes(self) -> int:
        """Bytes of the whole model as it was chosen."""
        return self.chosen.bytes

    @property
    def score(self) -> float:
        """Sum of the scores of what was chosen."""
        return self.chosen.score

    @property
    def choices(self) -> dict[str, str]:
        """Path of every module there was a choice for to what it got."""
        return {path: one.choice for one in self.decisions for path in one.members}

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Name of a group to choice to score."""
        return {d.name: {o.choice: o.score for o in d.options} for d in self.decisions}

    def recipe(self, at: Point | None = None) -> dict[str, Any]:
        """Return the recipe that quantizes a fresh model in this way, as plain data.

        Args:
            at: Another point of the front; by default what was chosen.
        """
        point = at if at is not None else self.chosen
        modules: dict[str, SlotsData] = dict(self.fixed)
        for decision, choice in zip(self.decisions, point.choices, strict=True):
            if choice != AS_IS:
                said = self.specs[choice]
                modules |= {path: said[path] for path in decision.members if path in said}
        used = [name for name in self.specs if name in point.choices]
        return recipe_of(
            modules,
            name=f"search-{'-'.join(used) or AS_IS}",
            description=f"found by a search ({self.method}): {point.bits:.3f} bits per weight",
            algorithm=[{"name": n, "options": dict(o)} if o else n for n, o in self.algorithm],
        )

    def to_yaml(self, path: str | Path, at: Point | None = None) -> None:
        """Write `recipe` as a file that ``bittern quantize --recipe`` takes."""
        import yaml

        text = yaml.safe_dump(self.recipe(at), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, the recipe included."""
        return {
            "method": self.method,
            "limits": dict(self.limits),
            "chosen": _point(self.chosen),
            "front": [_point(point) for point in self.front],
            "groups": [
                {
                    "name": one.name,
                    "members": list(one.members),
                    "elements": one.elements,
                    "choice": one.choice,
                    "options": [vars(option) for option in one.options],
                }
                for one in self.decisions
            ],
            "unreached": list(self.unreached),
            "notes": list(self.notes),
            "recipe": self.recipe(),
        }

    def to_json(self, path: str | Path) -> None:
        """Write the result as JSON."""
        text = json.dumps(self.to_dict(), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def to_svg(self, path: str | Path) -> None:
        """Draw the front: what the model suffers over what it takes."""
        from bittern.search.plot import draw

        Path(path).write_text(draw(self), encoding="utf-8")

    def show(self) -> None:
        """Show the choices and the front on the terminal."""
        from bittern.search.console import show_search

        show_search(self)


def _point(point: Point) -> dict[str, Any]:
    return {
        "bits": point.bits,
        "bytes": point.bytes,
        "seconds": point.seconds,
        "score": point.score,
        "counts": point.counts,
    }
