"""Runs the calibration steps of a plan over the data."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bittern.calibration.changes import sampled
from bittern.calibration.context import CalibrationContext
from bittern.calibration.reduce import RankError, agree
from bittern.calibration.sequential import Step, run_by_parts
from bittern.calibration.workdir import WorkDir
from bittern.errors import CalibrationError, DataError, PluginError
from bittern.nn import named_quantizers, quantizers_off
from bittern.nn.observer import SharedInputs
from bittern.planning.plain import spec_to
from bittern.records import Algorithm, CalibrationSummary, ModelAdapter, Plan
from bittern.registry import Registry
from bittern.registry.targets import bound
from bittern.runtime import (
    SILENT,
    Batch,
    Data,
    Fingerprint,
    Progress,
    call_forward,
    evaluating,
    length_of,
    prepare,
)
from bittern.runtime.ondisk import places_of
from bittern.runtime.ranks import alone
from bittern.tracing import Trace

__all__ = ["run_calibration"]

log = logging.getLogger("bittern.calibration")

EMPTY = "the calibration data holds no batch"


def run_calibration(
    model: nn.Module,
    plan: Plan,
    data: Data | None,
    *,
    registry: Registry,
    adapter: ModelAdapter,
    access: Callable[..., AbstractContextManager[None]],
    wrap: Callable[..., int],
    trace: Callable[[tuple[Any, ...], Mapping[str, Any]], Trace],
    layerwise: bool = False,
    work_dir: Path | None = None,
    versions: Mapping[str, str] = MappingProxyType({}),
    progress: Progress = SILENT,
) -> CalibrationSummary:
    """Run the plan's algorithms, left to right.

    Args:
        model: The converted model; it is run in eval mode without gradients.
        plan: Its plan.
        data: Batches, or a function that runs the model; not touched when no step needs it.
        registry: Knows the algorithms.
        adapter: What the model's framework knows.
        access: Makes a module's weights real.
        wrap: Runs a data pass, given as ``forward``, through the ``run_calibration`` hook.
        trace: Traces the model on the arguments of one call.
        layerwise: Whether all steps run on one block after the other.
        work_dir: Where blocks that are done are kept; a run that was killed goes on from there.
        versions: Of core and plugins: what was begun with others is not gone on with.
        progress: Shows where it is.

    Raises:
        CalibrationError: Data is needed and missing, or NaN or Inf was met; or, in several
            processes, one of them failed.
        DataError: The data holds no usable batch.
    """
    start = time.perf_counter()
    shared = SharedInputs()
    context = CalibrationContext(
        shared=shared,
        access=access,
        trace=cache(lambda: _trace(model, data, adapter, trace)),
        example=lambda: _example(model, data, adapter),
        progress=progress,
    )
    batches = 0
    seen = Fingerprint()

    def forward() -> int:
        nonlocal batches
        assert data is not None
        problem: Exception | None = None
        try:
            batches = wrap(forward=lambda: _pass(model, data, adapter, shared, progress, seen=seen))
        except Exception as error:
            problem = error
        seen.close()
        agree(problem)  # before anybody waits for statistics of a rank that has none
        return batches

    steps = [(registry.algorithms.get(name), options) for name, options in plan.algorithm]
    needs = frozenset().union(*(step.needs for step, _ in steps)) if steps else frozenset()
    needed = _needs_data(needs, plan)
    if needed and data is None:
        static = (e.path for e in plan.entries if e.needs_data)
        path = next(static, None)
        algorithms = ", ".join(name for name, _ in plan.algorithm)
        why = f"{path} is static" if path is not None else f"for {algorithms}"
        raise CalibrationError(
            f"the recipe {plan.recipe!r} needs calibration data ({why}), and there is none",
            hint="give data (--data FILE), or use a recipe with dynamic activations",
        )
    functions = [bound(s.run, plugin=registry.algorithms.plugin(s.name)) for s, _ in steps]
    for function, (step, options) in zip(functions, steps, strict=True):
        _check_options(function, step.name, options)  # all of them before the first data pass
    try:
        with evaluating(model), _together() if needed else nullcontext():
            parted = layerwise or work_dir is not None
            if places_of(model) and needed and work_dir is None:
                raise CalibrationError(
                    "weights of this model lie on the disk, and there is no place for changed ones",
                    hint="give a work directory (work_dir=..., --work-dir)",
                )
            ways = [needed and _by_parts(step, parted=parted) for step, _ in steps]
            _check_order(model, [step for step, _ in steps], ways, kept=work_dir is not None)
            if any(step.whole and "original" in step.needs for step, _ in steps[1:]):
                context = replace(context, originals=_originals(model, access))
            for by_parts, group in groupby(
                zip(ways, functions, steps, strict=True), lambda item: item[0]
            ):
                some = [_step(run, model, plan, *step) for _, run, step in group]
                if by_parts:
                    assert data is not None
                    found = _batches(model, data, adapter, seen)
                    batches = len(found)
                    with ExitStack() as stack:
                        work = None
                        if work_dir is not None:
                            about = _about(model, plan, versions, seen)
                            work = stack.enter_context(WorkDir(_own(work_dir), about).locked())
                        run_by_parts(
                            model,
                            plan,
                            some,
                            batches=found,
                            adapter=adapter,
                            context=context,
                            wrap=lambda forward: wrap(forward=forward),
                            work=work,
                        )
                else:
                    for one in some:
                        one.run(plan, forward if needed else None, context)
    except BaseException:
        for undo in reversed(context.undo):
            undo()
        raise
    uncalibrated = tuple(name for name, q in named_quantizers(model) if not q.calibrated)
    for name in uncalibrated:
        log.warning("%s saw no data and stays unquantized", name)
    return CalibrationSummary(
        batches=batches,
        seconds=time.perf_counter() - start,
        uncalibrated=uncalibrated,
        data=seen.value,
        unseen_experts=context.unseen_experts,
        saturation=context.saturation,
    )


def _about(
    model: nn.Module, plan: Plan, versions: Mapping[str, str], seen: Fingerprint
) -> dict[str, Any]:
    """Return what the result depends on, as plain data."""
    return {
        "algorithm": [[name, dict(options)] for name, options in plan.algorithm],
        "data": seen.value,
        "plan": {entry.path: spec_to(entry.spec) for entry in plan.entries},
        "ranks": len(agree()),
        "tensors": sampled(model),
        "versions": {**versions, "torch": torch.__version__},
    }


def _own(work_dir: Path) -> Path:
    """Return the work directory of this rank."""
    return work_dir if alone() else work_dir / f"rank-{dist.get_rank()}"


def _by_parts(step: Algorithm, *, parted: bool) -> bool:
    """Return whether a step runs block by block."""
    return step.sequential or (parted and not step.whole)


def _check_order(
    model: nn.Module, steps: Sequence[Algorithm], by_parts: Sequence[bool], *, kept: bool
) -> None:
    """Raise if a step that takes the model as a whole cannot run where it stands."""
    whole = [index for index, step in enumerate(steps) if step.whole]
    if whole and places_of(model):
        raise CalibrationError(
            f"{steps[whole[0]].name} needs the whole model, and weights of it lie on the disk",
            hint="load the model into memory, or choose a recipe without this step",
        )
    if whole and kept and any(by_parts[whole[0] :]):
        after = steps[by_parts.index(True, whole[0])].name
        raise CalibrationError(
            f"{after} goes block by block after {steps[whole[0]].name}, which takes the whole "
            "model: a work directory keeps the blocks of one run through the model",
            hint="leave out the work directory, or put the step before",
        )


def _originals(model: nn.Module, access: Callable[..., Any]) -> dict[str, Tensor]:
    """Return copies of all parameters; of one that has several names, under the first."""
    names = {name for name, _ in model.named_parameters()}
    found = {}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            with access(module, write=False):
                for name, parameter in module.named_parameters(path, recurse=False):
                    if name in names:
                        found[name] = parameter.detach().clone()
    return found


def _needs_data(needs: frozenset[str], plan: Plan) -> bool:
    return ("data" in needs and plan.needs_data) or bool(needs - {"data"})


def _step(
    run: Callable[..., None],
    model: nn.Module,
    plan: Plan,
    algorithm: Algorithm,
    options: Mapping[str, object],
) -> Step:
    return Step(
        run=lambda plan, forward, context: run(model, plan, forward, context, **options),
        data=algorithm.sequential or _needs_data(algorithm.needs, plan),
        sequential=algorithm.sequential,
        original="original" in algorithm.needs,
    )


def _batches(model: nn.Module, data: Data, adapter: ModelAdapter, seen: Fingerprint) -> list[Batch]:
    """Return all batches, ready for the model: blocks are run on them again and again."""
    if callable(data) and not hasattr(data, "__iter__"):
        raise CalibrationError(
            "an algorithm that goes block by block needs batches, and the data is a function",
            hint="give the batches as a list, a DataLoader or a path",
        )
    found = []
    for index, raw in enumerate(data):
        seen.update(raw)
        found.append(prepare(raw, model, adapter, index=index))
    seen.close()
    if not found:
        raise DataError(EMPTY, hint="an iterator can be used up only once; give a list")
    return found


@contextmanager
def _together() -> Iterator[None]:
    """Let all ranks end well, or none: they may wait for each other within."""
    try:
        yield
    except Exception as error:
        known: BaseException | None = error
        while known is not None and not isinstance(known, RankError):
            known = known.__cause__
        if known is None:
            agree(error)
        raise
    agree()


def _trace(
    model: nn.Module,
    data: Data | None,
    adapter: ModelAdapter,
    trace: Callable[[tuple[Any, ...], Mapping[str, Any]], Trace],
) -> Trace | None:
    """Trace the model on its first batch, or on what its framework knows."""
    batch = _first(model, data, adapter)
    if batch is None:
        return None
    try:
        return trace(batch.args, batch.kwargs)
    except PluginError:
        raise
    except Exception as error:  # max calibration does well without; who needs a trace says so
        log.warning("the model was not traced: %s: %s", type(error).__name__, error)
        return None


def _example(model: nn.Module, data: Data | None, adapter: ModelAdapter) -> Any:
    """Run the unquantized model on its first batch."""
    batch = _first(model, data, adapter)
    if batch is None:
        return None
    with quantizers_off(model):
        return batch.run(model)


def _first(model: nn.Module, data: Data | None, adapter: ModelAdapter) -> Batch | None:
    """Return the first batch, or what the model's framework knows; ``None`` if neither is there."""
    if data is not None and not callable(data) and iter(data) is not data:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for every pass
            first = next(iter(data), None)
        if first is None:
            raise DataError(EMPTY)
        return prepare(first, model, adapter, index=0)
    if adapter.example_inputs is not None:
        return prepare(adapter.example_inputs(), model, adapter, index=0)
    return None  # a function, or an iterator that can be used up only once


def _check_options(function: Callable[..., Any], name: str, options: Mapping[str, object]) -> None:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            raise CalibrationError(
                f"the algorithm {name!r} has no option {option!r}",
                hint=f"it has {', '.join(known)}" if known else "it has none",
            )
        default = known[option]
        kind = bool if isinstance(default, bool) else int | float
        if isinstance(default, int | float) and not isinstance(value, kind):
            raise CalibrationError(  # the text "no" would count as true
                f"the option {option!r} of the algorithm {name!r} is {value!r}",
                hint="write true or false, without quotes" if kind is bool else "write a number",
            )


def _pass(
    model: nn.Module,
    data: Data,
    adapter: ModelAdapter,
    shared: SharedInputs,
    progress: Progress,
    *,
    seen: Fingerprint,
) -> int:
    count = 0
    raw: Any
    if callable(data) and not hasattr(data, "__iter__"):

        def started(*_: Any) -> None:  # every run of the model counts as a batch
            nonlocal count
            shared.batch = count
            count += 1

        handle = model.register_forward_pre_hook(started)
        try:
            call_forward(data, model)
        finally:
            handle.remove()
        return max(count, 1)
    for raw in progress.track(data, "calibrating", total=length_of(data)):
        shared.batch = count
        seen.update(raw)
        prepare(raw, model, adapter, index=count).run(model)
        count += 1
    if count == 0:
        raise DataError(
            EMPTY,
            hint="an iterator can be used up only once; give a list or a DataLoader",
        )
    return count
