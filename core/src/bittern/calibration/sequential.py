"""Runs steps part by part: blocks in order, and what is in none before and after them.

Two streams of activations go through the blocks. A step of the kind ``sequential`` sees what the
quantized blocks before it compute; any other step sees what the unquantized model computes, as it
does when it runs on the whole model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bittern.calibration.blocks import Part, block_of, find_chains, find_parts
from bittern.calibration.changes import changes, put_back, versions
from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.reduce import agree
from bittern.calibration.replay import BlockRun, Replay, Ways, find_ways
from bittern.calibration.workdir import WorkDir
from bittern.nn import (
    named_quant_modules,
    named_quantizers,
    quantizers_of,
    quantizers_off,
    switched_off,
)
from bittern.records import ModelAdapter, Plan
from bittern.runtime import Batch
from bittern.runtime.ondisk import held, places_of, relocate
from bittern.tracing import Trace

__all__ = ["Step", "run_by_parts"]

# Field of the context to what steps noted in it: name of a quantizer to a plain value.
Notes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Step:
    """One algorithm with its options.

    Attributes:
        run: Called with the plan of a part, what runs its data, and its context.
        data: Whether it runs the data.
        sequential: Whether it sees what quantized blocks compute.
        original: Whether it asks for the outputs of unquantized blocks.
    """

    run: Callable[[Plan, Forward | None, CalibrationContext], None]
    data: bool
    sequential: bool
    original: bool


def run_by_parts(
    model: nn.Module,
    plan: Plan,
    steps: Sequence[Step],
    *,
    batches: Sequence[Batch],
    adapter: ModelAdapter,
    context: CalibrationContext,
    wrap: Callable[[Forward], int],
    work: WorkDir | None = None,
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
        work: Where parts that are done are kept, and taken from.

    Raises:
        CalibrationError: The work directory cannot be read or written.
    """
    chains = find_chains(model, adapter)
    others = [path for path in plan.modules if block_of(path, chains) is None]
    ways = _agreed(model, batches, chains, others)
    parts = find_parts(plan, chains, early=ways.early)
    quantized = any(step.sequential for step in steps)
    originals = any(step.original for step in steps)
    unquantized = originals or any(step.data and not step.sequential for step in steps)
    streams = _Streams(
        model,
        originals=originals,
        quantized=Replay(model, batches, chains, ways) if quantized else None,
        unquantized=Replay(model, batches, chains, ways) if unquantized else None,
    )
    context.undo.append(partial(relocate, model, places_of(model)))
    waiting = {path for part in parts for path in part.modules}
    done = min(agree(payload=work.done() if work is not None else 0))
    numbered = context.progress.track(enumerate(parts), "calibrating blocks", total=len(parts))
    for index, part in numbered:
        if work is not None and index < done:
            put_back(model, work.changes(index), context)
            _tell(work.notes(index), context)
            relocate(model, work.places(index))
            streams.skip(part, work.after(index) if index == done - 1 else None)
            waiting -= set(part.modules)
            continue
        own = replace(
            context,
            only=frozenset(part.modules),
            trace=partial(_inside, part, chains, context.trace),
            access=partial(streams.access, context.access),
            unseen_experts={},
            saturation={},
        )
        more = index + 1 < len(parts)
        with held(model.get_submodule(part.name)) if part.name else nullcontext():
            before = versions(model)
            with _off(model, waiting - set(part.modules)):
                streams.enter(part, more=more)
                for step in steps:
                    forward = streams.forward(step, own, wrap) if step.data else None
                    step.run(
                        plan.part(part.modules), forward, replace(own, block=streams.block(step))
                    )
                waiting -= set(part.modules)
                streams.leave(more=more)
            notes: Notes = {"unseen_experts": own.unseen_experts, "saturation": own.saturation}
            _tell(notes, context)
            if work is not None:
                found = changes(model, part.modules, before)
                streams.take(work.keep(index, found, notes, streams.state()))
                relocate(model, work.places(index))


def _tell(notes: Notes, context: CalibrationContext) -> None:
    """Tell the context of the whole run what was noted about a part."""
    context.unseen_experts.update(notes["unseen_experts"])
    context.saturation.update(notes["saturation"])


def _agreed(
    model: nn.Module, batches: Sequence[Batch], chains: Sequence[Sequence[str]], others: list[str]
) -> Ways:
    """Return how the blocks can be run on every rank: they are to go through the same parts."""
    problem: Exception | None = None
    ways: Ways | None = None
    try:
        with quantizers_off(model):
            ways = find_ways(model, batches, chains, others)
    except Exception as error:
        problem = error
    own = None if ways is None else (ways.stub, ways.fresh, sorted(ways.early))
    stubs, fresh, early = zip(*agree(problem, own), strict=True)
    return Ways(stub=all(stubs), fresh=any(fresh), early=frozenset(early[0]))


def _inside(
    part: Part, chains: Sequence[Sequence[str]], trace: Callable[[], Trace | None]
) -> Trace | None:
    """Return what the trace says within a part: a change beyond it would come too late."""
    found = trace()
    if found is None:
        return None
    return found.within(lambda path: (block_of(path, chains) or "") == part.name)


class _Streams:
    """The inputs of the part that is calibrated, as the two models compute them.

    What the unquantized part returns is taken from the first pass of a step that runs it as it is.
    Where there is none, the part is run for it before a weight changes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        originals: bool,
        quantized: Replay | None,
        unquantized: Replay | None,
    ) -> None:
        self._model = model
        self._originals = originals
        self._unknown = False  # whether outputs of the unquantized part are still to be found
        self._quantized = quantized
        self._unquantized = unquantized
        self._block: BlockRun | None = None
        self._beside: BlockRun | None = None  # the same, with what the unquantized one returned
        self._before: BlockRun | None = None

    def enter(self, part: Part, *, more: bool) -> None:
        """Find the inputs of a part.

        Args:
            part: The part.
            more: Whether another one comes after it, which reads what this one returns.
        """
        self._block = self._beside = self._before = None
        if not part.name:
            return
        outputs: Sequence[Any] = ()
        if self._unquantized is not None:
            with quantizers_off(self._model):
                self._before = self._unquantized.enter(part.name)
                if self._originals:
                    outputs = self._unquantized.leave(self._before)
            self._unknown = more and not self._originals
        if self._quantized is not None:
            self._block = self._quantized.enter(part.name)
            if self._before is not None and self._originals:
                self._beside = self._block.beside(self._before, outputs)

    def access(
        self, access: Callable[..., AbstractContextManager[None]], module: nn.Module, *, write: bool
    ) -> AbstractContextManager[None]:
        """Make a module's weights real, as ``access`` does."""
        if write:
            self._settle()
        return access(module, write=write)

    def leave(self, *, more: bool) -> None:
        """Run the part as it is now, if another one comes after it."""
        self._settle()
        if more and self._block is not None and self._quantized is not None:
            self._quantized.settle(self._block)
        for replay in (self._quantized, self._unquantized):
            if replay is not None and not more:
                replay.outputs.clear()

    def _settle(self) -> None:
        """Find what the unquantized part returns, as long as it is what it was."""
        if self._unknown:
            assert self._unquantized is not None
            assert self._before is not None
            self._unknown = False
            with quantizers_off(self._model):
                self._unquantized.settle(self._before)

    def skip(self, part: Part, state: Any) -> None:
        """Take a part for done.

        Args:
            part: The part.
            state: What `state` returned after it, if it is the last one.
        """
        for replay in (self._quantized, self._unquantized):
            if replay is not None and part.name:
                replay.skip(part.name)
        if state is not None:
            self.take(state)

    def state(self) -> dict[str, Any]:
        """Return what the next part needs: what blocks returned, where random numbers are."""
        outputs = {
            name: {
                str(chain): {str(batch): output for batch, output in found.items()}
                for chain, found in replay.outputs.items()
            }
            for name, replay in (("quantized", self._quantized), ("original", self._unquantized))
            if replay is not None
        }
        return {**outputs, "random": torch.get_rng_state()}

    def take(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name, replay in (("quantized", self._quantized), ("original", self._unquantized)):
            if replay is not None:
                replay.outputs = {
                    int(chain): {int(batch): output for batch, output in found.items()}
                    for chain, found in state[name].items()
                }
        torch.set_rng_state(state["random"])

    def block(self, step: Step) -> BlockRun | None:
        """Return the block as a step sees it."""
        if not step.sequential:
            return self._before
        return self._beside if step.original else self._block

    def forward(
        self,
        step: Step,
        context: CalibrationContext,
        wrap: Callable[[Forward], int],
    ) -> Forward:
        """Return what runs the data through the part."""
        block = self.block(step)
        replay = self._quantized if step.sequential else self._unquantized
        assert replay is not None

        def run() -> int:
            if block is None:
                return replay.rest(partial(setattr, context.shared, "batch"))
            keep = self._unknown and not step.sequential and _plain(block.module)
            outputs = []
            for index in range(block.batches):
                context.shared.batch = block.batch(index)
                output = block.run(index)
                if keep:
                    outputs.append(output)
            if keep:
                self._unknown = False
                replay.done(block, outputs)
            return block.batches

        def forward() -> int:
            with nullcontext() if step.sequential else _only(self._model, context):
                return wrap(run)

        return forward


def _plain(module: nn.Module) -> bool:
    """Return whether a module computes what the unquantized one does."""
    off = not any(quantizer.enabled for _, quantizer in named_quantizers(module))
    return off and not torch.is_grad_enabled()


@contextmanager
def _only(model: nn.Module, context: CalibrationContext) -> Iterator[None]:
    """Switch off all quantizers but those that are calibrated now."""
    others = {path for path, _ in named_quant_modules(model)} - (context.only or set())
    with _off(model, others):
        yield


@contextmanager
def _off(model: nn.Module, modules: set[str]) -> Iterator[None]:
    """Switch off the quantizers of some modules."""
    found = (
        q
        for path, module in named_quant_modules(model)
        if path in modules
        for _, q in quantizers_of(path, module)
    )
    with switched_off(found):
        yield
