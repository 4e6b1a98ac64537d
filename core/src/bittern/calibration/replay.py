"""Runs single blocks of a model on what the blocks before them compute.

The inputs of a block are found by running the model up to it. Blocks that are done are not run
again: in their place stands what the last of them returned, so a pass costs the embedding and one
block, and masks and positions come from the model itself. That is right for models whose blocks
pass on one stream. Whether this one does is tried on the first batch; a model whose blocks are
called twice, or look further back, is run whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bittern.errors import CalibrationError
from bittern.runtime import Batch

__all__ = ["BlockRun", "Call", "Replay", "find_replay"]

_SAMPLES = 4096  # numbers of an output that are compared
_CLOSE = 1e-2  # kernels round differently now and then; a wrong input is far off


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):  # noqa: N818
    """The block whose inputs are looked for was called."""


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
    ) -> None:
        self.name = name
        self.module = module
        self._calls = calls
        self._fresh = fresh
        self._originals = originals

    def beside(self, originals: Sequence[Any]) -> BlockRun:
        """Return the block with what the unquantized one returned.

        Args:
            originals: One output per call.
        """
        return BlockRun(self.name, self.module, self._calls, fresh=self._fresh, originals=originals)

    @property
    def batches(self) -> int:
        """How often the block is called in a data pass."""
        return len(self._calls)

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


class Replay:
    """Finds the inputs of the blocks of a model, one after the other.

    Args:
        model: The model, in eval mode.
        batches: Its data, ready for it.
        chains: Its blocks.
        stub: Whether blocks that are done are replaced by what they returned.
        fresh: Whether blocks write into their arguments, or keep a state in them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        chains: Sequence[Sequence[str]],
        *,
        stub: bool = True,
        fresh: bool = False,
    ) -> None:
        self._model = model
        self._batches = batches
        self._chain = {name: index for index, chain in enumerate(chains) for name in chain}
        self._stub = stub
        self._fresh = fresh
        self._done: list[str] = []
        self._outputs: dict[int, list[Any]] = {}

    @torch.no_grad()
    def enter(self, name: str) -> BlockRun:
        """Return a block with its inputs.

        Raises:
            CalibrationError: No batch reaches it.
        """
        module = self._model.get_submodule(name)
        calls: list[Call] = []

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(_alike(Call(args, dict(kwargs)), calls[-1] if calls else None))
            if self._fresh:
                calls[-1] = copy.deepcopy(calls[-1])
            if self._stub:
                raise _Reached

        handle = module.register_forward_pre_hook(take, with_kwargs=True)
        try:
            for index, batch in enumerate(self._batches):
                with self._stubs(index), suppress(_Reached):
                    batch.run(self._model)
        finally:
            handle.remove()
        return BlockRun(name, module, calls, fresh=self._fresh)

    @torch.no_grad()
    def leave(self, block: BlockRun) -> list[Any]:
        """Run a block for the last time, so that the next one can be entered; return its outputs.

        Args:
            block: What `enter` returned, as its outputs are to be: quantized or not.
        """
        if not self._stub:
            return []
        outputs = [block.run(index) for index in range(block.batches)]
        self._outputs[self._chain[block.name]] = outputs
        self._done.append(block.name)
        return outputs

    @contextmanager
    def _stubs(self, index: int) -> Iterator[None]:
        """Let blocks that are done return the last output of their chain."""
        with ExitStack() as stack:
            for name in self._done if self._stub else ():
                outputs = self._outputs[self._chain[name]]
                if index < len(outputs):
                    module = self._model.get_submodule(name)
                    stack.enter_context(_returning(module, outputs[index]))
            yield


@contextmanager
def _returning(module: nn.Module, value: Any) -> Iterator[None]:
    """Let a module return a value without running."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_, **__: value
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def find_replay(
    model: nn.Module, batches: Sequence[Batch], chains: Sequence[Sequence[str]]
) -> Callable[[], Replay]:
    """Try on the first batch how the blocks of a model can be run, and return what makes replays.

    Args:
        model: The model with its quantizers off.
        batches: Its data.
        chains: Its blocks.
    """
    stub, fresh = _try(model, batches[:1], chains)
    return lambda: Replay(model, batches, chains, stub=stub, fresh=fresh)


@torch.no_grad()
def _try(
    model: nn.Module, batches: Sequence[Batch], chains: Sequence[Sequence[str]]
) -> tuple[bool, bool]:
    """Return whether blocks can be stubbed, and whether they change what they are given."""
    names = [name for chain in chains for name in chain]
    seen: list[tuple[str, list[Tensor]]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.append((name, _digest(out)))
        )
        for name in names
    ]
    try:
        batches[0].run(model)
    finally:
        for handle in handles:
            handle.remove()
    expected = dict(seen)
    stub = [name for name, _ in seen] == names
    fresh = False
    replay = Replay(model, batches, chains, stub=stub)
    for name in names:
        block = replay.enter(name)
        if block.batches == 0:
            continue
        last = block.batches - 1
        if not stub:
            once, twice = _digest(block.run(last)), _digest(block.run(last))
            fresh |= not _same(once, twice)
            continue
        changed = _versions(block.inputs(0))
        once, twice = _digest(block.run(0)), _digest(block.run(0))
        fresh |= not _same(once, twice) or changed != _versions(block.inputs(0))
        if not _same(once, expected[name]):
            return False, True
        replay = _moved_on(replay, block, fresh=fresh)
    return stub, fresh


def _moved_on(replay: Replay, block: BlockRun, *, fresh: bool) -> Replay:
    replay._fresh = fresh
    if fresh:
        block = replay.enter(block.name)
    replay.leave(block)
    return replay


def _alike(call: Call, before: Call | None) -> Call:
    """Return a call that shares with the one before what is equal: masks, positions."""
    if before is None:
        return call
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    known, other = pytree.tree_flatten((before.args, before.kwargs))
    if structure != other:
        return call
    shared = [
        k
        if isinstance(x, Tensor)
        and isinstance(k, Tensor)
        and x.shape == k.shape
        and x.dtype == k.dtype
        and torch.equal(x, k)
        else x
        for x, k in zip(leaves, known, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(shared, structure)
    return Call(args, kwargs)


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
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return False
        difference = (a - b).nan_to_num().norm()
        if difference > _CLOSE * b.nan_to_num().norm():
            return False
    return True
