"""Learns the rounding of the weights of a module by signed gradients of any loss.

While it goes on, the module is called with rounded weights in the place of its own
(`torch.func.functional_call`): nothing in it changes until the result is written. Gradients have
the same size for all offsets, so only their signs are followed; the step falls to 0 in a straight
line (Cheng et al., arXiv:2309.05516, algorithm 1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.calibration.learned import LearnedWeight
from bittern.calibration.reduce import reduce_sum
from bittern.errors import CalibrationError
from bittern.nn.weights import Reader, quantized_weights
from bittern.runtime import SILENT, Progress

__all__ = ["Pace", "Rounding", "learnable"]

log = logging.getLogger("bittern.calibration")

_CLIP = 0.1  # ranges come from a search: they take smaller steps than offsets
_GAIN = 0.02  # and gains still smaller ones


@dataclass(frozen=True)
class Pace:
    """How the rounding is learned.

    Attributes:
        steps: Number of steps.
        lr: First step of the offsets, in distances of neighbors on the grid.
        clip: First step of the clips, as a share of the range; 0 leaves ranges as they are.
        gain: First step of gains and biases, as a share of their largest magnitude; 0 leaves them.
    """

    steps: int
    lr: float
    clip: float
    gain: float = 0.0

    @classmethod
    def of(cls, *, steps: int, lr: float, clip: bool, norms: bool) -> Pace:
        """Return the pace that the options of an algorithm ask for.

        Args:
            steps: Number of steps.
            lr: First step of the offsets; 0 stands for ``1 / steps``.
            clip: Whether ranges are learned.
            norms: Whether gains and biases are learned.

        Raises:
            CalibrationError: A number is out of range.
        """
        if steps < 1 or lr < 0:
            raise CalibrationError(
                f"rounding is learned in {steps} steps at lr {lr}",
                hint="at least 1 step, and an lr of at least 0; 0 stands for 1 / steps",
            )
        first = lr or 1 / steps
        return cls(steps, lr=first, clip=_CLIP * first * clip, gain=_GAIN * first * norms)


def learnable(module: nn.Module, names: frozenset[str]) -> list[Reader]:
    """Return who quantizes the weights of a module whose rounding can be learned.

    Left out are weights that others read too, and those whose quantizer does more than rounding in
    a static range.

    Args:
        module: The module.
        names: Names of the quantizers (`TensorQuantizer.name`) that are calibrated.
    """
    found = []
    for weight in quantized_weights(module)[0]:
        reader = weight.readers[0]
        spec, plain = reader.quantizer.spec, reader.quantizer.transforms is None
        if len(weight.readers) > 1 or reader.quantizer.name not in names:
            continue
        if plain and not spec.dynamic and spec.constant_amax is None:
            found.append(reader)
        else:
            log.info("%s is rounded to nearest: there is no range to learn", reader.quantizer.name)
    return found


class Rounding:
    """The learned rounding of some weights of a module.

    Args:
        module: The module.
        readers: The weights, from `learnable`, at their ranges.
        gains: Whether gains and biases are learned, too: what has one dimension.

    Attributes:
        module: The module.
        readers: The weights.
    """

    def __init__(self, module: nn.Module, readers: Sequence[Reader], *, gains: bool) -> None:
        self.module = module
        self.readers = readers
        self._learned = [_learned(reader) for reader in readers]
        names = {reader.name for reader in readers}
        fixed = {n: p.detach() for n, p in module.named_parameters() if n not in names}
        moved = {n: p for n, p in fixed.items() if gains and p.dim() == 1 and p.is_floating_point()}
        self._units = {n: p.abs().max().float() for n, p in moved.items()}
        self._gains = {n: p.float().clone().requires_grad_() for n, p in moved.items()}
        self._fixed = {n: p for n, p in fixed.items() if n not in moved}

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters of the module, those that are learned as they are rounded now."""
        dtypes = {n: p.dtype for n, p in self.module.named_parameters()}
        learned = {r.name: w() for r, w in zip(self.readers, self._learned, strict=True)}
        found = {n: p.to(dtypes[n]) for n, p in (learned | self._gains).items()}
        return {**self._fixed, **found}

    def learn(
        self,
        losses: Iterator[Callable[[Mapping[str, Tensor]], Tensor]],
        pace: Pace,
        progress: Progress = SILENT,
    ) -> None:
        """Follow the gradients of one loss after the other.

        Args:
            losses: Functions of the weights, one for each step.
            pace: How far each step goes.
            progress: Shows the steps.
        """
        offsets = [learned.offset for learned in self._learned]
        clips = [clip for learned in self._learned for clip in learned.clips]
        for clip in clips:
            clip.requires_grad_(pace.clip > 0)
        for step in progress.track(range(pace.steps), "learning to round", total=pace.steps):
            left = 1 - step / pace.steps
            with torch.enable_grad():
                next(losses)(self.weights()).backward()  # type: ignore[no-untyped-call]
            _sum_over_ranks([*offsets, *clips, *self._gains.values()])
            with torch.no_grad():
                for tensor in offsets:
                    _follow(tensor, pace.lr * left)
                for tensor in clips:
                    _follow(tensor, pace.clip * left)
                for name, tensor in self._gains.items():
                    _follow(tensor, float(self._units[name]) * pace.gain * left)
            for learned in self._learned:
                learned.bound()

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the start: rounding to nearest."""
        for learned in self._learned:
            learned.reset()
        for name, gain in self._gains.items():
            gain.copy_(self.module.get_parameter(name))

    def write(self, context: CalibrationContext, *, rounded: bool = True) -> None:
        """Give the module its weights, and the quantizers their ranges.

        Args:
            context: Keeps what was there.
            rounded: Whether weights are rounded; if not, they are what is rounded to that.
        """
        for reader, learned in zip(self.readers, self._learned, strict=True):
            context.remember(reader.module, reader.tensor)
            weight: Tensor = getattr(reader.module, reader.tensor)
            with torch.no_grad():
                weight.copy_(learned.hard() if rounded else learned.target())
            reader.quantizer.set_range(learned.range())
            if reader.quantizer.then is not None:
                reader.quantizer.then.calibrate_on(learned.hard())
        for name, gain in self._gains.items():
            path, _, local = name.rpartition(".")
            owner = self.module.get_submodule(path)
            context.remember(owner, local)
            with torch.no_grad():
                getattr(owner, local).copy_(gain)

    @contextmanager
    def given(self) -> Iterator[None]:
        """Let the module take weights as they are given: they are rounded already."""
        with ExitStack() as stack:
            for reader in self.readers:
                stack.callback(setattr, reader.quantizer, "enabled", reader.quantizer.enabled)
                reader.quantizer.enabled = False
            yield


def _learned(reader: Reader) -> LearnedWeight:
    values, quantizer = reader.quantizer.range, reader.quantizer
    assert values is not None
    weight: Tensor = getattr(reader.module, reader.tensor).detach()
    return LearnedWeight(weight, values, quantizer.spec)


def _sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Let all ranks follow the gradients of all their data."""
    grads = {str(i): t.grad for i, t in enumerate(tensors) if t.grad is not None}
    for key, total in reduce_sum(grads).items():
        tensors[int(key)].grad = total


def _follow(tensor: Tensor, step: float) -> None:
    """Go a step against the sign of the gradient, and forget it."""
    if tensor.grad is not None:
        tensor.sub_(tensor.grad.sign_(), alpha=step)
        tensor.grad = None
