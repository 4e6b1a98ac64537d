"""Which rows of the data a step of learning takes, and the module's arguments for them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bittern.calibration.reduce import reduce_sum
from bittern.calibration.replay import BlockRun
from bittern.errors import CalibrationError
from bittern.nn import quantizers_off

__all__ = ["Piece", "Pieces", "Task", "floats", "in_half", "mean_square"]

log = logging.getLogger("bittern.calibration")

_HELD = 8  # one of so many rows, or calls, is held out
_CLOSE = 2e-2  # rows alone give what they give among others, up to kernels


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of one call; all of them if ``rows`` is ``None``."""

    call: int
    rows: Tensor | None


class Pieces:
    """Cuts the calls of a module into pieces of a few rows.

    A call is cut along the first dimension of what has as many rows as its input, if the module
    then computes the same, which is tried once. An eighth of the rows is held out, where there are
    enough: what was learned from the others is judged by them.

    Args:
        block: The module and its calls.
        rows: Rows of a step, or the rows of one call if that has more and cannot be cut.
        seed: Says in which order they are taken.

    Raises:
        CalibrationError: ``rows`` is no positive number.
    """

    def __init__(self, block: BlockRun, *, rows: int, seed: int) -> None:
        if rows < 1:
            raise CalibrationError(f"a step takes {rows} rows", hint="at least 1")
        self._block = block
        self._rows = rows
        self._generator = torch.Generator().manual_seed(seed)
        self._sizes = [_size(block.inputs(index)) for index in range(block.batches)]
        self._cut = self._can_be_cut()
        self._taught, self._held = self._parted()

    def checks(self, count: int) -> list[tuple[Piece, ...]]:
        """Return up to ``count`` steps of rows that are held out; of any, where none are.

        Args:
            count: How many steps, at most.
        """
        held: list[tuple[Piece, ...]] = [
            (Piece(call, part),)
            for call, rows in self._held.items()
            for part in (torch.split(rows, self._rows) if rows is not None else [None])
        ]
        return held[:count] or list(islice(self, count))

    @torch.no_grad()
    def run_in_half(self) -> bool:
        """Return whether the module runs with products in bfloat16: not every operator does."""
        if not self._sizes:
            return False
        module = self._block.module
        try:
            with quantizers_off(module), in_half(module, half=True):
                self._block.run(0)
        except RuntimeError as error:
            log.info("%s is run in its own dtype: %s", self._block.name or "the model", error)
            return False
        return True

    def _parted(self) -> tuple[dict[int, Tensor | None], dict[int, Tensor | None]]:
        """Return the rows of every call to learn from, and those held out; ``None`` for all."""
        taught: dict[int, Tensor | None] = dict.fromkeys(range(len(self._sizes)))
        held: dict[int, Tensor | None] = {}
        if not self._cut:
            for call in range(len(self._sizes) // _HELD):
                held[call] = taught.pop(call)
            return taught, held
        numbered = torch.split(torch.arange(sum(self._sizes)), self._sizes)
        for call, rows in enumerate(numbered):
            chosen = rows % _HELD == _HELD - 1
            if bool(chosen.any()) and not bool(chosen.all()):
                held[call] = chosen.nonzero().flatten()
                taught[call] = (~chosen).nonzero().flatten()
        return taught, held

    def __iter__(self) -> Iterator[tuple[Piece, ...]]:
        """Yield the pieces of a step, without end: all that are not held out, and again."""
        while True:
            chunks: list[tuple[int, Piece]] = []
            for call, taught in self._taught.items():
                size = self._sizes[call]
                if taught is None and (not self._cut or size <= self._rows):
                    chunks.append((size, Piece(call, None)))
                    continue
                known = torch.arange(size) if taught is None else taught
                order = known[torch.randperm(len(known), generator=self._generator)]
                parts = torch.split(order, self._rows)
                chunks += [(len(part), Piece(call, part)) for part in parts]
            count = 0
            step: list[Piece] = []
            for index in torch.randperm(len(chunks), generator=self._generator).tolist():
                size, piece = chunks[index]
                count, step = count + size, [*step, piece]
                if count >= self._rows:
                    yield tuple(step)
                    count, step = 0, []
            if step:
                yield tuple(step)

    def inputs(self, piece: Piece) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the module for a piece."""
        found: tuple[tuple[Any, ...], dict[str, Any]]
        found = self.take(piece, self._block.inputs(piece.call))
        return found

    def take(self, piece: Piece, values: Any) -> Any:
        """Return the rows of a piece of all tensors that have rows.

        Args:
            piece: The piece.
            values: Anything that holds tensors.
        """
        if piece.rows is None:
            return values
        size, rows = self._sizes[piece.call], piece.rows

        def take(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and len(value) == size:
                return value[rows.to(value.device)]
            return value

        return pytree.tree_map(take, values)

    @torch.no_grad()
    def _can_be_cut(self) -> bool:
        """Return whether the module computes the same for a row as for it among others."""
        if not self._sizes or self._sizes[0] < 2:
            return bool(self._sizes)
        some = Piece(0, torch.arange(1, 2))
        with quantizers_off(self._block.module):
            whole = floats(self.take(some, self._block.run(0)))
            args, kwargs = self.inputs(some)
            try:
                alone = floats(self._block.module(*args, **kwargs))
            except (RuntimeError, IndexError, ValueError):  # shapes that do not fit
                return False
        return len(alone) == len(whole) and all(map(_near, alone, whole))


class Task(ABC):
    """How far the outputs of a module are off with other weights: what is learned from."""

    @abstractmethod
    def of(self, piece: Piece, weights: Mapping[str, Tensor]) -> Tensor:
        """Return it for one piece.

        Args:
            piece: The rows.
            weights: Parameters of the module, by name.
        """

    def loss(self, step: Sequence[Piece], weights: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over the pieces of a step."""
        return torch.stack([self.of(piece, weights) for piece in step]).mean()

    @torch.no_grad()
    def error(self, steps: Sequence[Sequence[Piece]], weights: Mapping[str, Tensor]) -> float:
        """Return the mean over some steps and all ranks."""
        losses = torch.stack([self.loss(step, weights) for step in steps])
        return float(reduce_sum({"loss": losses.mean()})["loss"])


def floats(values: Any) -> list[Tensor]:
    """Return the floating tensors of arguments or of an output."""
    leaves = pytree.tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def in_half(module: nn.Module, *, half: bool) -> torch.autocast:
    """Return the context in which products of a float32 module are computed in bfloat16.

    Args:
        module: The module.
        half: Whether they are.
    """
    parameters = list(module.parameters())
    wide = all(p.dtype == torch.float32 for p in parameters)
    device = parameters[0].device.type if parameters else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=half and wide)


def mean_square(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean square over what is no padding.

    Args:
        values: Any shape.
        mask: Which positions count, in the first dimensions of ``values``; of another shape, or
            ``None``: all.
    """
    if mask is None or values.shape[: mask.dim()] != mask.shape:
        return values.square().mean()
    counted = values[mask.to(values.device).bool()]
    return counted.square().sum() / max(counted.numel(), 1)


def _size(inputs: Any) -> int:
    """Return the first extent of the first floating tensor, or of the first tensor."""
    every = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    first = next((x for x in every if x.is_floating_point()), every[0] if every else None)
    return 0 if first is None else len(first)


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a.float() - b.float()).norm() <= _CLOSE * b.float().norm())
