"""Learned rounding of a whole model: its outputs are those of the unquantized one.

The offsets, clips and gains of all blocks (`bittern.calibration.descent`) follow the signs of the
gradients of ``KL(original || quantized)`` at the logits; of a model that gives none, an encoder
for one, those of the squared error of its outputs. What block-wise targets cannot see counts
here: which errors of a block the later ones forgive. The price is memory: for the activations of
the whole model, and for two more numbers per weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.descent import Pace, Rounding, learnable
from bittern.calibration.gram import planned_weights
from bittern.calibration.pieces import Piece, Pieces, Task, floats, in_half, mean_square
from bittern.calibration.replay import BlockRun, Call
from bittern.calibration.rounding import find_start
from bittern.errors import CalibrationError
from bittern.evaluation import logits_of
from bittern.nn import named_quantizers, quantizers_off
from bittern.records import ModelAdapter, Plan
from bittern.training.losses import divergence

__all__ = ["run_distill_rounding"]

log = logging.getLogger("bittern.calibration")

_TINY = torch.finfo(torch.float32).tiny
_CHECKS = 4  # steps on whose rows the result is compared with the start


def run_distill_rounding(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    steps: int = 200,
    rows: int = 4,
    lr: float = 0.005,
    clip: bool = True,
    norms: bool = False,
    half: bool = True,
    seed: int = 0,
) -> None:
    """Learn the rounding of all weights of a model at once, and write them as rounded values.

    What has no range yet gets one, as in `run_learn_rounding`; where learning did not lower the
    divergence, weights are rounded to nearest. Steps before it may have changed the weights
    (``gptq`` and ``learn-rounding`` with ``rounded: false`` give it a better start): the outputs
    that are to be kept are those of the model before the first step.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data.
        context: Services.
        steps: Number of steps.
        rows: Rows of the data per step.
        lr: First step of the offsets, see `bittern.calibration.descent.Pace`. Ten times as much
            does harm: all weights move at once, by what a few rows say.
        clip: Whether ranges are learned, too.
        norms: Whether gains and biases are learned, too.
        half: Whether products are computed in bfloat16 while learning, where weights are float32.
        seed: Which rows are taken when.

    Raises:
        CalibrationError: An option is out of range, or there is no data.
    """
    pace = Pace.of(steps=steps, lr=lr, clip=clip, norms=norms)
    if forward is None:
        raise CalibrationError("rounding is learned from data, and there is none")
    find_start(model, plan, forward, context)
    calls = _calls(model, forward)
    names = frozenset(q.name for q in planned_weights(model, plan).values())
    with ExitStack() as stack:
        for path in plan.modules:
            stack.enter_context(context.access(model.get_submodule(path), write=True))
        rounding = Rounding(model, learnable(model, names), gains=norms)
        if not rounding.readers:
            return
        pieces = Pieces(calls, rows=rows, seed=seed)
        task = _Task(calls, pieces, context.originals, half=half)
        stack.enter_context(rounding.given())
        taken = iter(pieces)
        checks = pieces.checks(_CHECKS)
        before = task.error(checks, rounding.weights())
        losses = (partial(task.loss, step) for step in taken)
        rounding.learn(losses, pace, context.progress)
        after = task.error(checks, rounding.weights())
        log.info("error of the outputs %.3g, rounded to nearest %.3g", after, before)
        if not after < before:
            rounding.reset()
        rounding.write(context)


def _calls(model: nn.Module, forward: Forward) -> BlockRun:
    """Return the model with the arguments of all its calls."""
    calls: list[Call] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(Call(args, dict(kwargs))), with_kwargs=True
    )
    try:
        with quantizers_off(model):
            forward()
    finally:
        handle.remove()
    return BlockRun("", model, calls, masks=[_mask(call) for call in calls])


def _mask(call: Call) -> Tensor | None:
    """Return which tokens are no padding."""
    mask = call.kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


class _Task(Task):
    """How far the model's outputs are off.

    Args:
        calls: The model and its calls.
        pieces: Its data.
        originals: Its parameters as they were; those that are missing are as they are.
        half: Whether products are computed in bfloat16.
    """

    def __init__(
        self, calls: BlockRun, pieces: Pieces, originals: Mapping[str, Tensor], *, half: bool
    ) -> None:
        self._calls, self._pieces = calls, pieces
        self._originals = dict(originals)
        self._half = half and pieces.run_in_half()
        found = (q.transforms for _, q in named_quantizers(calls.module) if originals)
        self._moved = [t for t in found if t is not None and t.pre_scale is not None]

    def of(self, piece: Piece, weights: Mapping[str, Tensor]) -> Tensor:
        """Return how far the outputs for a piece are off, over what is no padding."""
        model = self._calls.module
        args, kwargs = self._pieces.inputs(piece)
        with in_half(model, half=self._half):
            with torch.no_grad(), self._unquantized():
                truth = functional_call(model, self._originals, args, kwargs)
            found = functional_call(model, dict(weights), args, kwargs)
        mask = self._pieces.take(piece, self._calls.mask(piece.call))
        if _has_logits(truth):
            return _divergence(_logits(found), _logits(truth), mask)
        pairs = zip(floats(found), floats(truth), strict=True)
        return torch.stack([_relative(a.float(), b.float(), mask) for a, b in pairs]).sum()

    @contextmanager
    def _unquantized(self) -> Iterator[None]:
        """Let the model be what it was: scales that steps took out of inputs belong to them."""
        with ExitStack() as stack:
            stack.enter_context(quantizers_off(self._calls.module))
            for transforms in self._moved:
                stack.callback(setattr, transforms, "pre_scale", transforms.pre_scale)
                transforms.pre_scale = None
            yield


def _has_logits(output: Any) -> bool:
    """Return whether a model gives logits: a tensor is taken for that, an output with names not."""
    if isinstance(output, Mapping):
        return "logits" in output
    return isinstance(output, Tensor) or hasattr(output, "logits")


def _logits(output: Any) -> Tensor:
    return logits_of(output, ModelAdapter())


def _divergence(found: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
    counted = None if mask is None or mask.shape != found.shape[:-1] else mask.bool()
    return divergence(found, truth, counted, temperature=1.0)


def _relative(found: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
    """Return the squared error of an output, relative to its size."""
    return mean_square(found - truth, mask) / mean_square(truth, mask).clamp_min(_TINY)
