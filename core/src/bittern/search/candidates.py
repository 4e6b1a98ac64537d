"""The candidates: recipes that any part of a model may get, planned for this model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bittern.config import RecipeLike
from bittern.config.schema import as_algorithms
from bittern.errors import PlanError, RecipeError
from bittern.records import Plan, PlanEntry
from bittern.registry import nearest
from bittern.search.context import SearchSteps

__all__ = ["AS_IS", "Candidate", "Candidates", "Pipeline", "matching", "plan_candidates"]

AS_IS = "none"  # the choice to leave a part as it is
Pipeline = tuple[tuple[str, Mapping[str, object]], ...]
Entries = Mapping[str, Mapping[str, PlanEntry]]


@dataclass(frozen=True)
class Candidate:
    """A recipe and what it does to the model.

    Attributes:
        name: Its name among the candidates.
        plan: Its plan of the whole model.
        entries: Module path to slot to entry, of the modules whose weights it quantizes.
    """

    name: str
    plan: Plan
    entries: Entries


@dataclass(frozen=True)
class Candidates:
    """All candidates of one search.

    Attributes:
        every: The candidates, in the order that was given.
        pipeline: The calibration steps of all of them.
        fixed: Modules without quantized weights that all candidates quantize alike, as attention
            with a KV cache: they cost no bits, so there is nothing to choose.
        notes: What people should know.
    """

    every: tuple[Candidate, ...]
    pipeline: Pipeline
    fixed: Entries
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules whose weights some candidate quantizes, in the model's order."""
        return tuple(dict.fromkeys(path for one in self.every for path in one.entries))

    def part(self, candidate: Candidate, modules: Sequence[str]) -> Plan:
        """Return what a candidate does to some modules, calibrated as all candidates are."""
        wanted = set(modules)
        plan = candidate.plan
        return replace(
            plan,
            entries=tuple(e for e in plan.entries if e.module in wanted),
            classes={path: cls for path, cls in plan.classes.items() if path in wanted},
            algorithm=self.pipeline,
        )


def plan_candidates(
    model: nn.Module,
    candidates: Sequence[RecipeLike] | Mapping[str, RecipeLike],
    steps: SearchSteps,
    *,
    algorithm: Any = None,
) -> Candidates:
    """Plan every candidate for a model.

    Args:
        model: The model; it is not changed.
        candidates: Recipes, or names to recipes.
        steps: The steps.
        algorithm: Calibration steps for all, as in a recipe; by default the pipeline of that
            candidate whose steps contain, in order, those of all the others.

    Raises:
        RecipeError: There are no candidates, or two of one name; or one is malformed.
        PlanError: No pipeline contains the others, or one candidate quantizes nothing.
    """
    if isinstance(candidates, str):  # a sequence of letters otherwise
        candidates = [candidates]
    named = list(candidates.items()) if isinstance(candidates, Mapping) else None
    recipes = [steps.recipe(r) for r in (dict(named).values() if named else candidates)]
    if not recipes:
        raise RecipeError("there are no candidates", hint='give recipes, as ["nvfp4", "fp8"]')
    names = [name for name, _ in named] if named else [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1 or name == AS_IS:
            raise RecipeError(
                f"the candidates have two of the name {name!r}"
                if name != AS_IS
                else f"{AS_IS!r} is the choice to leave a part as it is",
                hint="give names: {'first': recipe, 'second': recipe}",
            )
    every = []
    for name, recipe in zip(names, recipes, strict=True):
        plan = steps.plan(model, recipe)
        bearing = {entry.module for entry in plan.entries if entry.shape is not None}
        table = {path: slots for path, slots in plan.by_module().items() if path in bearing}
        every.append(Candidate(name, plan, table))
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    every = [replace(one, entries=_ordered(one.entries, order)) for one in every]
    fixed, notes = _fixed(every)
    if algorithm is not None:
        pipeline: Pipeline = tuple(
            (step["name"], step.get("options", {})) for step in as_algorithms(algorithm)
        )
    else:
        pipeline = _joint(every)
    return Candidates(tuple(every), pipeline, fixed, notes)


def matching(patterns: Sequence[str], paths: Sequence[str]) -> set[str]:
    """Return the paths that globs mean.

    Raises:
        PlanError: A pattern means none.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        mine = {path for path in paths if fnmatchcase(path, pattern)}
        if not mine:
            close = ", ".join(nearest(pattern, list(paths), count=3))
            raise PlanError(
                f"the pattern {pattern!r} matches no module that a candidate quantizes",
                hint=f"the closest names are {close}" if close else None,
            )
        found |= mine
    return found


def _ordered(entries: Entries, order: Mapping[str, int]) -> Entries:
    return {path: entries[path] for path in sorted(entries, key=lambda p: order.get(p, len(order)))}


def _fixed(every: Sequence[Candidate]) -> tuple[Entries, tuple[str, ...]]:
    """Return what all candidates quantize alike without touching a weight, and what they do not."""
    tables = [
        {p: slots for p, slots in one.plan.by_module().items() if p not in one.entries}
        for one in every
    ]
    specs = [
        {path: {name: e.spec for name, e in slots.items()} for path, slots in table.items()}
        for table in tables
    ]
    fixed: dict[str, Mapping[str, PlanEntry]] = {}
    notes = []
    for path in dict.fromkeys(path for table in tables for path in table):
        if all(said.get(path) == specs[0].get(path) for said in specs):
            fixed[path] = tables[0][path]
        else:
            notes.append(
                f"{path} stays as it is: the candidates disagree about it, and it has no weights "
                "that a choice would make smaller"
            )
    return fixed, tuple(notes)


def _joint(every: Sequence[Candidate]) -> Pipeline:
    """Return the pipeline that contains the steps of all others in order."""
    pipelines = [one.plan.algorithm for one in every]
    for one in sorted(pipelines, key=len, reverse=True):
        if all(_contains(one, other) for other in pipelines):
            return one
    texts = "; ".join(f"{c.name}: {', '.join(n for n, _ in c.plan.algorithm)}" for c in every)
    raise PlanError(
        f"the candidates are calibrated in different ways ({texts})",
        hint="say how all of them are: algorithm=[...] (--algorithm)",
    )


def _contains(longer: Pipeline, shorter: Pipeline) -> bool:
    rest = iter(longer)
    return all(any(step == mine for mine in rest) for step in shorter)
