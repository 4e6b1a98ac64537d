"""Learned rounding: weights are rounded so that each block computes what it did.

Per block, the offsets and clips of all its weights (`bittern.calibration.learned`) follow the signs
of the gradients of the squared error of the block's output. Its input is what the quantized blocks
before it compute, its target what it returned before anything was quantized, so that each block
also makes up for what those before it lost. This is the way of AutoRound (Cheng et al., "Optimize
Weight Rounding via Signed Gradient Descent", arXiv:2309.05516), with the block-wise target of BRECQ
(Li et al., arXiv:2102.05426), for every format that has a codec. Activations are rounded as they
will be, straight through for gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.descent import Pace, Rounding, learnable
from bittern.calibration.gram import observe_grams, planned_weights
from bittern.calibration.max import run_max
from bittern.calibration.pieces import Piece, Pieces, Task, floats, in_half, mean_square
from bittern.calibration.replay import BlockRun
from bittern.calibration.weighted import search_range
from bittern.errors import CalibrationError
from bittern.records import Plan

__all__ = ["find_start", "run_learn_rounding"]

log = logging.getLogger("bittern.calibration")

_TINY = torch.finfo(torch.float32).tiny
_CHECKS = 4  # steps on whose rows the result is compared with the start


def run_learn_rounding(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    steps: int = 200,
    rows: int = 8,
    lr: float = 0.0,
    clip: bool = True,
    norms: bool = False,
    half: bool = True,
    rounded: bool = True,
    seed: int = 0,
) -> None:
    """Learn the rounding of the weights of a block, and write them as rounded values.

    What has no range yet gets one: activations the largest magnitude, weights the range with the
    least error of their outputs. Weights in no block, and those that are not learned, are left at
    that. Where learning did not lower the error on rows that were held out, the block is rounded to
    nearest.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data.
        context: Services; ``block`` is what is learned.
        steps: Steps per block.
        rows: Rows of the data per step.
        lr: First step of the offsets, see `bittern.calibration.descent.Pace`; 0 stands for
            ``1 / steps``, with which an offset can just get from the middle to an end.
        clip: Whether ranges are learned, too.
        norms: Whether the gains and biases of the block are learned, too.
        half: Whether products are computed in bfloat16 while learning, where weights are float32.
        rounded: Whether weights hold the rounded numbers; if not, they hold what is rounded to
            them, for a step that goes on from there.
        seed: Which rows are taken when.

    Raises:
        CalibrationError: An option is out of range, or there is no data.
    """
    pace = Pace.of(steps=steps, lr=lr, clip=clip, norms=norms)
    if forward is None:
        raise CalibrationError("rounding is learned from data, and there is none")
    find_start(model, plan, forward, context)
    block = context.block
    if block is None:
        log.info("rounded to nearest, since it is in no block: %s", ", ".join(plan.modules))
        return
    names = frozenset(q.name for q in planned_weights(model, plan).values())
    with ExitStack() as stack:
        for path in plan.modules:
            stack.enter_context(context.access(model.get_submodule(path), write=True))
        rounding = Rounding(block.module, learnable(block.module, names), gains=norms)
        if not rounding.readers:
            return
        pieces = Pieces(block, rows=rows, seed=seed)
        task = _Task(block, pieces, half=half)
        stack.enter_context(rounding.given())
        taken = iter(pieces)
        checks = pieces.checks(_CHECKS)
        before = task.error(checks, rounding.weights())
        losses = (partial(task.loss, step) for step in taken)
        rounding.learn(losses, pace)
        after = task.error(checks, rounding.weights())
        log.info("%s: error %.3g, rounded to nearest %.3g", block.name, after, before)
        if not after < before:
            rounding.reset()
        rounding.write(context, rounded=rounded)


def find_start(model: nn.Module, plan: Plan, forward: Forward, context: CalibrationContext) -> None:
    """Give every planned quantizer that has no range one.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data.
        context: Services.
    """
    if all(quantizer.calibrated for _, quantizer in context.quantizers(model)):
        return
    run_max(model, plan, forward, context)
    grams = observe_grams(model, plan, forward, context)
    for name, quantizer in planned_weights(model, plan).items():
        if name in grams:
            module = model.get_submodule(name.rpartition(".")[0])
            search_range(module, quantizer, grams[name], context)


class _Task(Task):
    """How far a block's outputs are off: their squared error, relative to their size.

    Args:
        block: The block.
        pieces: Its data.
        half: Whether products are computed in bfloat16.
    """

    def __init__(self, block: BlockRun, pieces: Pieces, *, half: bool) -> None:
        self._block, self._pieces = block, pieces
        first, mask = floats(block.original(0)), block.mask(0)
        self._units = [mean_square(t.float(), mask).clamp_min(_TINY) for t in first]
        self._half = half and pieces.run_in_half()

    def of(self, piece: Piece, weights: Mapping[str, Tensor]) -> Tensor:
        """Return how far the outputs for a piece are off, over what is no padding."""
        block, take = self._block, partial(self._pieces.take, piece)
        args, kwargs = self._pieces.inputs(piece)
        with in_half(block.module, half=self._half):
            found = floats(functional_call(block.module, dict(weights), args, kwargs))
        targets = floats(take(block.original(piece.call)))
        mask = take(block.mask(piece.call))
        terms = [
            mean_square(out.float() - target.float(), mask) / unit
            for out, target, unit in zip(found, targets, self._units, strict=True)
        ]
        return torch.stack(terms).sum()
