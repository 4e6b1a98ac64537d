"""Runs steps block by block, each block on what the quantized blocks before it compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from bittern.calibration.blocks import Part, find_chains, find_parts
from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.reduce import agree
from bittern.calibration.replay import BlockRun, Replay, find_replay
from bittern.nn import named_quant_modules, quantizers_of, quantizers_off
from bittern.records import ModelAdapter, Plan
from bittern.runtime import Batch

__all__ = ["Step", "run_sequential"]

# Runs one algorithm on a part of the model: its plan, what runs the data, its context.
Step = Callable[[Plan, Forward, CalibrationContext], None]


def run_sequential(
    model: nn.Module,
    plan: Plan,
    steps: Sequence[Step],
    *,
    batches: Sequence[Batch],
    adapter: ModelAdapter,
    context: CalibrationContext,
    wrap: Callable[[Forward], int],
    original: bool = False,
) -> None:
    """Run all steps on one part of a model after the other.

    Args:
        model: The converted model, in eval mode.
        plan: Its plan.
        steps: The algorithms, left to right.
        batches: The data, ready for the model.
        adapter: What the model's framework knows.
        context: Services.
        wrap: Runs a data pass through the ``run_calibration`` hook.
        original: Whether a step asks for the outputs of unquantized blocks.
    """
    chains = find_chains(model, adapter)
    parts = find_parts(model, plan, chains)
    with quantizers_off(model):
        problem: Exception | None = None
        try:
            make = find_replay(model, batches, chains)
        except Exception as error:
            problem = error
        agree(problem)  # before anybody waits for statistics of a rank that has none
    quantized, unquantized = make(), make() if original else None
    waiting = {path for part in parts for path in part.modules}
    for part in context.progress.track(parts, "calibrating blocks", total=len(parts)):
        block: BlockRun | None = None
        with _off(model, waiting - set(part.modules)):
            if part.name:
                block = _enter(model, part, quantized, unquantized)
            own = replace(context, only=frozenset(part.modules), block=block)
            for step in steps:
                step(plan.part(own.only or ()), _forward(model, batches, own, wrap), own)
            waiting -= set(part.modules)
            if block is not None:
                quantized.leave(block)


def _enter(model: nn.Module, part: Part, quantized: Replay, unquantized: Replay | None) -> BlockRun:
    block = quantized.enter(part.name)
    if unquantized is None:
        return block
    with quantizers_off(model):
        before = unquantized.enter(part.name)
        outputs = unquantized.leave(before) or [before.run(i) for i in range(before.batches)]
    return block.beside(outputs)


def _forward(
    model: nn.Module,
    batches: Sequence[Batch],
    context: CalibrationContext,
    wrap: Callable[[Forward], int],
) -> Forward:
    """Return what runs the data through a block, or through the model if there is none."""
    block = context.block

    def run() -> int:
        count = len(batches) if block is None else block.batches
        for index in range(count):
            context.shared.batch = index
            if block is None:
                batches[index].run(model)
            else:
                block.run(index)
        return count

    return lambda: wrap(run)


@contextmanager
def _off(model: nn.Module, modules: set[str]) -> Iterator[None]:
    """Switch off what is calibrated later: it has no ranges yet."""
    found = [
        q
        for path, module in named_quant_modules(model)
        if path in modules
        for _, q in quantizers_of(path, module)
        if q.enabled
    ]
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in found:
            quantizer.enabled = True
