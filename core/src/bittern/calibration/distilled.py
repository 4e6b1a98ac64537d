"""Learned rounding of a whole model: its outputs are those of the unquantized one.

The offsets, clips and gains of all blocks (`bittern.calibration.descent`) follow the signs of the
gradients of ``KL(original || quantized)`` at the logits. What block-wise targets cannot see counts
here: which errors of a block the later ones forgive. The price is memory: for the activations of
the whole model, and for two more numbers per weight.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.descent import Pace, Rounding, learnable
from bittern.calibration.gram import planned_weights
from bittern.calibration.pieces import Piece, Pieces, in_half
from bittern.calibration.reduce import reduce_sum
from bittern.calibration.replay import BlockRun, Call
from bittern.calibration.rounding import find_start
from bittern.errors import CalibrationError
from bittern.evaluation import logits_of
from bittern.nn import quantizers_off
from bittern.records import ModelAdapter, Plan
from bittern.training.losses import divergence

__all__ = ["run_distill_rounding"]

log = logging.getLogger("bittern.calibration")

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
    divergence, weights are rounded to nearest.

    Args:
        model: The converted model; its outputs are logits.
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
        DataError: The model's output holds no logits.
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
        stack.enter_context(rounding.given())
        taken = iter(pieces)
        checks = pieces.checks(_CHECKS)
        loss = partial(_loss, calls, pieces, half=half)
        before = _error(loss, checks, rounding.weights())
        losses = (partial(loss, step) for step in taken)
        rounding.learn(losses, pace)
        after = _error(loss, checks, rounding.weights())
        log.info("KL %.3g, rounded to nearest %.3g", after, before)
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


def _loss(
    calls: BlockRun,
    pieces: Pieces,
    step: Sequence[Piece],
    weights: Mapping[str, Tensor],
    *,
    half: bool,
) -> Tensor:
    """Return the divergence of the logits over what is no padding."""
    model, terms = calls.module, []
    for piece in step:
        args, kwargs = pieces.inputs(piece)
        with in_half(model, half=half):
            with torch.no_grad(), quantizers_off(model):
                truth = _logits(model(*args, **kwargs))
            found = _logits(functional_call(model, dict(weights), args, kwargs))
        mask = pieces.take(piece, calls.mask(piece.call))
        counted = None if mask is None or mask.shape != found.shape[:-1] else mask.bool()
        terms.append(divergence(found, truth, counted, temperature=1.0))
    return torch.stack(terms).mean()


def _logits(output: Any) -> Tensor:
    return logits_of(output, ModelAdapter())


@torch.no_grad()
def _error(loss: Any, steps: Sequence[Sequence[Piece]], weights: Mapping[str, Tensor]) -> float:
    losses = torch.stack([loss(step, weights) for step in steps])
    return float(reduce_sum({"loss": losses.mean()})["loss"])
