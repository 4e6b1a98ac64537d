"""Runs data through a model, candidate by candidate, and measures what each does to every group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from bittern.convert import remember
from bittern.errors import CalibrationError
from bittern.planning.plain import spec_to
from bittern.records import Plan
from bittern.runtime import Progress, prepare
from bittern.runtime.ranks import agree
from bittern.search.candidates import Candidate, Candidates
from bittern.search.context import SearchSteps
from bittern.search.groups import DecisionGroup
from bittern.search.losses import LossFunction
from bittern.search.sensitivity import Probe, Sums, measure_of
from bittern.search.store import ScoreFile, fingerprint_of_batches, fingerprint_of_model

__all__ = ["Scoring", "quantized_for_a_while", "score_candidate", "signature_of"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How sensitivity is measured.

    Attributes:
        method: Name of the measure.
        batches: The data.
        count: How many batches are looked at.
        loss: The loss of the measure ``gradient``; ``None`` takes the model's own.
        progress: Shows where it is.
    """

    method: str
    batches: Sequence[Any]
    count: int
    loss: LossFunction | None
    progress: Progress


def score_candidate(
    model: nn.Module,
    candidate: Candidate,
    *,
    candidates: Candidates,
    groups: Sequence[DecisionGroup],
    store: ScoreFile,
    how: Scoring,
    steps: SearchSteps,
) -> Sums:
    """Measure what a candidate does to each group, over all ranks.

    Args:
        model: The plain model; it comes back as it was, bit for bit.
        candidate: The candidate.
        candidates: All of them.
        groups: The groups.
        store: What was measured before; each batch is added to it.
        how: How.
        steps: The steps.

    Returns:
        Name of a group to the sum and the count it is to be divided by; no entry for one that saw
        no data.
    """
    done = store.batches(candidate.name)
    if done < how.count:
        own = [group for group in groups if set(group.members) & candidate.entries.keys()]
        plan = candidates.part(candidate, [path for group in own for path in group.members])
        problem: Exception | None = None
        with quantized_for_a_while(model, plan, how.batches, steps=steps, progress=how.progress):
            try:
                _run(model, candidate.name, own, store=store, how=how, steps=steps)
            except Exception as error:
                problem = error
            everyone = agree(problem, store.sums(candidate.name), failure=CalibrationError)
    else:
        everyone = [store.sums(candidate.name)]
    found: Sums = {}
    for sums in everyone:
        for name, (value, count) in sums.items():
            before, known = found.get(name, (0.0, 0.0))
            found[name] = (before + value, known + count)
    return found


def _run(
    model: nn.Module,
    name: str,
    groups: Sequence[DecisionGroup],
    *,
    store: ScoreFile,
    how: Scoring,
    steps: SearchSteps,
) -> None:
    adapter = steps.adapter(model)
    measure = measure_of(how.method)
    for parameter in model.parameters():  # only the outputs of modules need gradients
        parameter.requires_grad_(False)
    probe = Probe(model=model, groups=groups, adapter=adapter, loss=how.loss)
    done = store.batches(name)
    rows = enumerate(how.batches[: how.count])
    raw: Any
    for index, raw in how.progress.track(rows, f"scoring {name}", total=how.count):
        if index >= done:
            batch = prepare(raw, model, adapter, index=index)
            store.add(name, measure(probe, batch, index))


@contextmanager
def quantized_for_a_while(
    model: nn.Module, plan: Plan, data: Any, *, steps: SearchSteps, progress: Progress
) -> Iterator[None]:
    """Quantize and calibrate a model while the block runs; then it is what it was, bit for bit.

    Steps may change weights (SmoothQuant, GPTQ), so there is a copy of all tensors meanwhile.
    """
    undo, give_back = remember(model), _numbers(model)
    try:
        steps.convert(model, plan)
        steps.calibrate(model, plan, data, progress=progress)
        yield
    finally:
        undo()
        give_back()


def _numbers(model: nn.Module) -> Callable[[], None]:
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers()) if not t.is_meta}
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def give_back() -> None:
        with torch.no_grad():
            for tensor, copy in copies:
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)

    return give_back


def signature_of(
    model: nn.Module, candidates: Candidates, groups: Sequence[DecisionGroup], how: Scoring
) -> dict[str, Any]:
    """Return everything that scores depend on, as plain data."""
    loss = getattr(how.loss, "__qualname__", type(how.loss).__qualname__)
    return {
        "model": fingerprint_of_model(model),
        "data": fingerprint_of_batches(how.batches),
        "batches": how.count,
        "method": how.method,
        "loss": None if how.loss is None else loss,
        "algorithm": [[name, dict(options)] for name, options in candidates.pipeline],
        "groups": {group.name: list(group.members) for group in groups},
        "candidates": {
            one.name: {
                path: {name: spec_to(entry.spec) for name, entry in slots.items()}
                for path, slots in one.entries.items()
            }
            for one in candidates.every
        },
    }
