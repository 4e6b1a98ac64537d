"""Runs single blocks of a model on what the blocks before them compute.

The inputs of a block are found by running the model up to it. Blocks that are done are not run
again: in their place stands what the last of them returned, so a pass costs the embedding and one
block, and masks and positions come from the model itself. That is right for models whose blocks
pass on one stream. Whether this one does is tried on the first batch; a model whose blocks are
called twice, or look further back, is run whole. A block that a batch does not reach (an early
exit, a mixture of depths) has no call of this batch, and what came before it stays the last output.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bittern.errors import CalibrationError
from bittern.runtime import Batch

__all__ = ["BlockRun", "Call", "Replay", "Ways", "find_ways"]

_SAMPLES = 4096  # numbers of an output that are compared
_CLOSE = 1e-2  # kernels round differently now and then; a wrong input is far off


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block.

    Attributes:
        args: Positional ones.
        kwargs: Those by name.
        batch: Number of the batch that is running.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int = 0


class _Reached(Exception):  # noqa: N818
    """The block up to which the model is run was called."""


class BlockRun:
    """A block and its inputs: what an algorithm of the kind ``sequential`` works on.

    Attributes:
        name: Path of the block.
        module: The block.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        calls: Sequence[Call],
        *,
        fresh: bool = False,
        originals: Sequence[Any] | None = None,
        masks: Sequence[Tensor | None] = (),
    ) -> None:
        self.name = name
        self.module = module
        self._calls = calls
        self._fresh = fresh
        self._originals = originals
        self._masks = masks

    def beside(self, original: BlockRun, outputs: Sequence[Any]) -> BlockRun:
        """Return the block with what the unquantized one returned, in the calls that both have.

        Args:
            original: The block after unquantized ones.
            outputs: What it returned, one per call.
        """
        known = dict(zip(_places(original._calls), outputs, strict=True))
        both = [(i, place) for i, place in enumerate(_places(self._calls)) if place in known]
        return BlockRun(
            self.name,
            self.module,
            [self._calls[index] for index, _ in both],
            fresh=self._fresh,
            originals=[known[place] for _, place in both],
            masks=[self._masks[index] for index, _ in both] if self._masks else (),
        )

    @property
    def batches(self) -> int:
        """How often the block is called in a data pass."""
        return len(self._calls)

    def batch(self, index: int) -> int:
        """Return the number of the batch that a call belongs to."""
        return self._calls[index].batch

    def inputs(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments of a call."""
        call = self._calls[index]
        if self._fresh:  # the block writes into what it is given
            call = copy.deepcopy(call)
        return call.args, call.kwargs

    def run(self, index: int) -> Any:
        """Call the block and return what it returns."""
        args, kwargs = self.inputs(index)
        return self.module(*args, **kwargs)

    def mask(self, index: int) -> Tensor | None:
        """Return which tokens of a call are no padding, ``(rows, tokens)``; ``None``: all are."""
        return self._masks[index] if self._masks else None

    def original(self, index: int) -> Any:
        """Return what the unquantized block returned, after unquantized blocks.

        Raises:
            CalibrationError: The algorithm did not ask for it (``needs={"original"}``).
        """
        if self._originals is None:
            raise CalibrationError(
                "outputs of the unquantized block were not kept",
                where=self.name or None,
                hint='let the Algorithm record say needs={"original"}',
            )
        return self._originals[index]


@dataclass(frozen=True)
class Ways:
    """How the blocks of a model can be run.

    Attributes:
        stub: Whether blocks that are done can be replaced by what they returned.
        fresh: Whether they write into their arguments, or keep a state in them.
        early: Paths of modules in no block that run before the first block does.
    """

    stub: bool
    fresh: bool
    early: frozenset[str]


class Replay:
    """Finds the inputs of the blocks of a model, one after the other.

    Args:
        model: The model, in eval mode.
        batches: Its data, ready for it.
        chains: Its blocks.
        ways: How they can be run.

    Attributes:
        outputs: What the last block that is done and was reached returned, per chain and batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        chains: Sequence[Sequence[str]],
        ways: Ways,
    ) -> None:
        self._model = model
        self._batches = batches
        self._chain = {name: index for index, chain in enumerate(chains) for name in chain}
        self._stub = ways.stub
        self._fresh = ways.fresh
        self._done: list[str] = []
        self.outputs: dict[int, dict[int, Any]] = {}
        self._running = 0  # number of the batch

    @torch.no_grad()
    def enter(self, name: str) -> BlockRun:
        """Return a block with its inputs."""
        module = self._model.get_submodule(name)
        calls: list[Call] = []

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(args, dict(kwargs), self._running)
            calls.append(_alike(call, calls[-1] if calls else None))
            if self._fresh:
                calls[-1] = copy.deepcopy(calls[-1])
            if self._stub:
                raise _Reached

        handle = module.register_forward_pre_hook(take, with_kwargs=True)
        try:
            self._run()
        finally:
            handle.remove()
        # where blocks cannot be replaced, a block may be called with other rows than the batch has
        masks = [self._batches[call.batch].mask for call in calls] if self._stub else ()
        return BlockRun(name, module, calls, fresh=self._fresh, masks=masks)

    @torch.no_grad()
    def leave(self, block: BlockRun) -> Sequence[Any]:
        """Run a block for the last time, so that the next one can be entered; return its outputs.

        Args:
            block: What `enter` returned, as its outputs are to be: quantized or not.
        """
        outputs = [block.run(index) for index in range(block.batches)]
        self.done(block, outputs)
        return outputs

    def settle(self, block: BlockRun) -> None:
        """Run a block for the last time, if the next one can be entered by what it returns."""
        if self._stub:
            self.leave(block)

    def done(self, block: BlockRun, outputs: Sequence[Any]) -> None:
        """Take a block for done.

        Args:
            block: What `enter` returned.
            outputs: What it returned, one per call.
        """
        self.skip(block.name)
        if self._stub:
            known = self.outputs.setdefault(self._chain[block.name], {})
            known |= {block.batch(index): output for index, output in enumerate(outputs)}

    def skip(self, name: str) -> None:
        """Take a block for done whose outputs nobody asks for, or which are in `outputs`."""
        if self._stub:
            self._done.append(name)

    @torch.no_grad()
    def rest(self, started: Callable[[int], None]) -> int:
        """Run what is in no block on all batches: up to the first block that is not done, if any.

        Args:
            started: Called with the number of every batch.

        Returns:
            How many batches there are.
        """
        waiting = [name for name in self._chain if name not in self._done] if self._stub else []

        def stop(_: nn.Module, args: Any) -> None:
            raise _Reached

        with ExitStack() as stack:
            for name in waiting:
                handle = self._model.get_submodule(name).register_forward_pre_hook(stop)
                stack.callback(handle.remove)
            self._run(started)
        return len(self._batches)

    def _run(self, started: Callable[[int], None] = lambda _: None) -> None:
        """Run the model on all batches, with blocks that are done returning what is known."""
        with ExitStack() as stack:
            for name in self._done:
                known = self.outputs.get(self._chain[name], {})
                stack.enter_context(self._stubbed(self._model.get_submodule(name), known))
            for index, batch in enumerate(self._batches):
                self._running = index
                started(index)
                with suppress(_Reached):
                    batch.run(self._model)

    @contextmanager
    def _stubbed(self, module: nn.Module, known: Mapping[int, Any]) -> Iterator[None]:
        """Let a block return what is known of the batch that is running."""
        before, run = module.__dict__.get("forward"), module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return known[self._running] if self._running in known else run(*args, **kwargs)

        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


@torch.no_grad()
def find_ways(
    model: nn.Module,
    batches: Sequence[Batch],
    chains: Sequence[Sequence[str]],
    others: Collection[str] = (),
) -> Ways:
    """Try on the first batch how the blocks of a model can be run.

    Args:
        model: The model with its quantizers off.
        batches: Its data.
        chains: Its blocks.
        others: Paths of the modules in no block that are asked about.
    """
    names = [name for chain in chains for name in chain]
    seen: list[tuple[str, list[Tensor]]] = []
    early: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        return lambda _, __, output: seen.append((name, _digest(output)))

    def note(name: str) -> Callable[..., None]:
        return lambda *_: early.add(name) if not seen else None

    handles = [
        *(model.get_submodule(n).register_forward_hook(watch(n)) for n in names),
        *(model.get_submodule(n).register_forward_hook(note(n)) for n in others),
    ]
    try:
        batches[0].run(model)
    finally:
        for handle in handles:
            handle.remove()
    stub = [name for name, _ in seen] == names
    stub, fresh = _try(model, batches[:1], chains, expected=dict(seen) if stub else None)
    return Ways(stub, fresh, frozenset(early) if names else frozenset())


def _try(
    model: nn.Module,
    batches: Sequence[Batch],
    chains: Sequence[Sequence[str]],
    *,
    expected: Mapping[str, list[Tensor]] | None,
) -> tuple[bool, bool]:
    """Return whether blocks can be stubbed, and whether they change what they are given."""
    names = [name for chain in chains for name in chain]
    stub, fresh = expected is not None, False
    replay = Replay(model, batches, chains, Ways(stub, fresh, frozenset()))
    for name in names:
        block = replay.enter(name)
        if block.batches == 0:
            continue
        last = block.batches - 1
        before = _versions(block.inputs(last))
        output = block.run(last)
        once, twice = _digest(output), _digest(block.run(last))
        fresh |= not _same(once, twice) or before != _versions(block.inputs(last))
        if expected is not None and not _same(once, expected[name]):
            return False, True
        replay.done(block, [output] * block.batches)
    return stub, fresh


def _alike(call: Call, before: Call | None) -> Call:
    """Return a call that shares with the one before what is equal: masks, positions."""
    if before is None:
        return call
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    known, other = pytree.tree_flatten((before.args, before.kwargs))
    if structure != other:
        return call
    shared = [k if _equal(x, k) else x for x, k in zip(leaves, known, strict=True)]
    args, kwargs = pytree.tree_unflatten(shared, structure)
    return Call(args, kwargs, call.batch)


def _places(calls: Sequence[Call]) -> list[tuple[int, int]]:
    """Return for every call its batch, and the how many-th of this batch it is."""
    count: Counter[int] = Counter()
    found = []
    for call in calls:
        found.append((call.batch, count[call.batch]))
        count[call.batch] += 1
    return found


def _equal(x: Any, other: Any) -> bool:
    if not (isinstance(x, Tensor) and isinstance(other, Tensor)):
        return False
    return x.shape == other.shape and x.dtype == other.dtype and torch.equal(x, other)


def _digest(output: Any) -> list[Tensor]:
    """Return some numbers of every tensor of an output."""
    return [
        leaf.detach().flatten()[:: max(1, leaf.numel() // _SAMPLES)].float().clone()
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, Tensor)
    ]


def _versions(arguments: Any) -> list[int]:
    return [
        leaf._version
        for leaf in pytree.tree_leaves(arguments)
        if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    if [a.shape for a in one] != [b.shape for b in other]:
        return False
    for a, b in zip(one, other, strict=True):
        difference = (a - b).nan_to_num().norm()
        if difference > _CLOSE * b.nan_to_num().norm():
            return False
    return True
