"""The search: candidates, groups, scores, choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bittern.config import RecipeLike
from bittern.convert import modes_of
from bittern.errors import DataError, PlanError
from bittern.records import DataConfig
from bittern.runtime import SILENT, Progress, prepare
from bittern.runtime.ranks import alone
from bittern.search.candidates import AS_IS, Candidates, matching, plan_candidates
from bittern.search.context import SearchSteps
from bittern.search.cost import Latency, Ledger
from bittern.search.front import choose, front_of
from bittern.search.groups import DecisionGroup, find_groups
from bittern.search.losses import LossFunction
from bittern.search.result import Decision, SearchResult
from bittern.search.rules import slots_data
from bittern.search.score import Scoring, score_candidate, signature_of
from bittern.search.sensitivity import Sums, measure_of
from bittern.search.solve import Option
from bittern.search.store import ScoreFile

__all__ = ["run_search"]


def run_search(
    model: nn.Module,
    candidates: Sequence[RecipeLike] | Mapping[str, RecipeLike],
    data: Any,
    *,
    steps: SearchSteps,
    bits: float | None = None,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    latency: Latency | None = None,
    method: str = "gradient",
    loss: LossFunction | None = None,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    together: Sequence[str] = (),
    algorithm: Any = None,
    score_batches: int | None = None,
    scores: str | Path | None = None,
    points: int = 25,
    apply: bool = True,
    config: DataConfig | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Choose a recipe for every part of a model; `bittern.auto_quantize` explains the arguments."""
    limits = _limits(bits=bits, max_bytes=max_bytes, max_seconds=max_seconds, latency=latency)
    measure_of(method)
    if any(mode.name == "quantize" for mode in modes_of(model)):
        raise PlanError(
            "the model is quantized already", hint="bittern.revert(model), or load it again"
        )
    if scores is not None and not alone():
        raise PlanError("scores are kept in one process only", hint="leave out scores=")
    batches, count = _batches(steps.data(data, model, config), score_batches)
    adapter = steps.adapter(model)
    first = prepare(batches[0], model, adapter, index=0)
    every = plan_candidates(model, candidates, steps, algorithm=algorithm)
    excluded = matching(exclude, every.modules)
    modules = [path for path in every.modules if path not in excluded]
    if not modules:
        raise PlanError("there is no module left to choose for", hint="exclude fewer modules")
    kept = matching(keep, modules)
    groups, notes = find_groups(model, every, modules, batch=first, steps=steps, patterns=together)
    ledger = Ledger(model, every, modules, dtype=adapter.dtype, latency=latency)
    # What surely cannot be is refused before hours of measurements.
    unscored = [_costs(group, every, ledger, kept) for group in groups]
    counted = {"elements": sum(map(ledger.elements, groups)), "base": ledger.base}
    choose(unscored, limits, **counted)
    how = Scoring(method=method, batches=batches, count=count, loss=loss, progress=progress)
    signature = {} if scores is None else signature_of(model, every, groups, how)
    store = ScoreFile(None if scores is None else Path(scores), signature)
    sums = {
        one.name: score_candidate(
            model, one, candidates=every, groups=groups, store=store, how=how, steps=steps
        )
        for one in every.every
    }
    scored = _scored(groups, unscored, sums)
    chosen = choose(scored.table, limits, **counted)
    formats, known = steps.registry.formats, set(modules)
    result = SearchResult(
        method=method,
        limits=limits,
        chosen=chosen,
        front=front_of(scored.table, next(iter(limits)), points=points, also=chosen, **counted),
        decisions=tuple(
            Decision(
                name=group.name,
                members=group.members,
                elements=ledger.elements(group),
                options=tuple(options),
                choice=choice,
            )
            for group, options, choice in zip(groups, scored.table, chosen.choices, strict=True)
        ),
        algorithm=every.pipeline,
        specs={
            one.name: {p: slots_data(s, formats) for p, s in one.entries.items() if p in known}
            for one in every.every
        },
        fixed={path: slots_data(slots, formats) for path, slots in every.fixed.items()},
        unreached=scored.unreached,
        notes=(*every.notes, *notes, *scored.notes),
    )
    _check_recipe(model, result, every, steps)
    quantizes_nothing = not result.fixed and set(chosen.choices) == {AS_IS}
    if not apply or quantizes_nothing:
        return result
    done = steps.quantize(model, result.recipe(), batches, progress=progress)
    return replace(result, quantized=done)


def _limits(
    *,
    bits: float | None,
    max_bytes: int | None,
    max_seconds: float | None,
    latency: Latency | None,
) -> dict[str, float]:
    said = {"bits": bits, "bytes": max_bytes, "seconds": max_seconds}
    limits = {name: float(value) for name, value in said.items() if value is not None}
    if not limits:
        raise PlanError("there is no limit to keep to", hint="give bits=, max_bytes=, max_seconds=")
    for name, value in limits.items():
        if not (math.isfinite(value) and value > 0):
            raise PlanError(f"the limit on {name} is {value!r}", hint="give a positive number")
    if "seconds" in limits and latency is None:
        raise PlanError(
            "a limit on seconds needs latencies",
            hint="give latency={module: {candidate: seconds, 'none': seconds}}, or a function",
        )
    return limits


def _batches(data: Any, count: int | None) -> tuple[Sequence[Any], int]:
    """Return the batches, the same for every candidate, and how many of them are looked at."""
    if count is not None and count < 1:
        raise DataError("sensitivity is measured on one batch at least", hint="score_batches=1")
    if not hasattr(data, "__iter__"):
        raise DataError(
            f"a search needs batches, and got a {type(data).__name__}",
            hint="give a list of batches or a DataLoader",
        )
    # A loader that shuffles would show every candidate something else.
    batches = data if isinstance(data, list | tuple) else list(data)
    if not batches:
        raise DataError("the data holds no batch")
    return batches, len(batches) if count is None else min(count, len(batches))


def _costs(
    group: DecisionGroup, candidates: Candidates, ledger: Ledger, kept: set[str]
) -> list[Option]:
    """Return what can be chosen for a group, with its costs and no score yet."""
    names = [AS_IS]
    if kept.isdisjoint(group.members):
        names += [c.name for c in candidates.every if set(group.members) & c.entries.keys()]
    costs = {name: ledger.cost(group, name) for name in names}
    return [Option(choice=name, **vars(cost)) for name, cost in costs.items()]


@dataclass(frozen=True)
class _Scored:
    """The options of every group with their scores, and what came up meanwhile."""

    table: list[list[Option]]
    unreached: tuple[str, ...]
    notes: tuple[str, ...]


def _scored(
    groups: Sequence[DecisionGroup], unscored: list[list[Option]], sums: Mapping[str, Sums]
) -> _Scored:
    table: list[list[Option]] = []
    unreached: list[str] = []
    notes: list[str] = []
    for group, options in zip(groups, unscored, strict=True):
        found = []
        for option in options:
            if option.choice == AS_IS:
                found.append(option)
            elif group.name not in sums[option.choice]:
                unreached += group.members
            else:
                value, count = sums[option.choice][group.name]
                score = value / count if count else 0.0
                if math.isfinite(score):
                    found.append(replace(option, score=score))
                else:
                    notes.append(f"{group.name} cannot be {option.choice}: its score is {score}")
        table.append(found)
    return _Scored(table, tuple(dict.fromkeys(unreached)), tuple(notes))


def _check_recipe(
    model: nn.Module, result: SearchResult, candidates: Candidates, steps: SearchSteps
) -> None:
    """Make sure that the recipe says what was chosen."""
    entries = {one.name: one.entries for one in candidates.every}
    wanted = {
        (path, slot): entry.spec
        for path, choice in result.choices.items()
        if choice != AS_IS
        for slot, entry in entries[choice].get(path, {}).items()
    }
    wanted |= {(p, s): e.spec for p, slots in candidates.fixed.items() for s, e in slots.items()}
    if not wanted:
        return
    plan = steps.plan(model, result.recipe())
    planned = {(entry.module, entry.slot): entry.spec for entry in plan.entries}
    differ = [place for place in {**wanted, **planned} if wanted.get(place) != planned.get(place)]
    if differ:
        path, slot = differ[0]
        raise PlanError(
            f"the recipe would not say what was chosen: {wanted.get(differ[0])} became "
            f"{planned.get(differ[0])}",
            where=f"{path}.{slot}" if path else slot,
            hint="leave the candidate out that says so, or exclude the module",
        )
