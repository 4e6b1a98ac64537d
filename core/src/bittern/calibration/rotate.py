"""Rotation: spreads outliers over all channels by matrices that are folded into the weights.

A residual stream, the heads of the values and whatever else flows between linear layers only can
be multiplied by an orthogonal matrix ``R`` without a change of what the model computes: what makes
the stream is multiplied by ``R``, and what reads it by ``R^T`` (Ashkboos et al., QuaRot, 2024; Liu
et al., SpinQuant, 2024). `bittern.tracing.rotations` finds what that is. A gain of an RMSNorm goes
into the weights that read it first, which by itself takes outlier channels out of what they read.

``R = S H`` with random signs ``S`` and the Walsh-Hadamard matrix ``H`` over blocks of the largest
power of two that divides the channels. Between LayerNorms, which subtract a mean, it is ``H S H``
with the first sign of each block positive: it leaves the vector of ones, so the mean, alone.

What no weight can take up, such as the input of a down projection behind its gate, is left as it
is. Quantizers rotate it while the model runs, if a recipe says ``rotate: hadamard`` for the input
and the weight of such a layer; both go together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.moves import check_followed
from bittern.errors import CalibrationError
from bittern.nn import quantizers_off
from bittern.numerics.rotation import hadamard
from bittern.records import Member, Plan
from bittern.runtime.ondisk import places_of
from bittern.tracing import Trace
from bittern.tracing.rotations import Gain, Rotatable, find_rotations

__all__ = ["run_rotate"]

log = logging.getLogger("bittern.calibration")

NAME = "rotate"

_ELEMENTS = 2**24  # that are rotated at once
_LIMIT, _LIMIT_HALF = 1e-3, 0.15  # relative errors of outputs, the latter of 16 bits
_FEW = 0.05  # share of the outputs that may be beyond


def run_rotate(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    residual: bool = True,
    heads: bool = True,
    seed: int = 0,
) -> None:
    """Rotate what planned weights read, where the model's weights can take the rotation up.

    Weights that are not planned change, too: embeddings, norms, the head. They are rounded to their
    dtype once more. Where the outputs of the first batch are not what they were, all is put back.
    Where the model cannot be traced, nothing happens.

    Args:
        model: The converted model; its weights change, its function does not.
        plan: Its plan.
        forward: Unused.
        context: Services; gives the trace and the first batch.
        residual: Whether to rotate residual streams and other whole layers' channels.
        heads: Whether to rotate the channels of each head of attention's values.
        seed: Of the signs.

    Raises:
        CalibrationError: No step that sets ranges follows, or the model is calibrated block by
            block and residual streams are to be rotated; or outputs are not what they were, and
            weights lie on the disk.
    """
    check_followed(NAME, plan)
    if residual and (context.only is not None or places_of(model)):
        raise CalibrationError(
            "a residual stream goes through all blocks, and cannot be rotated block by block",
            hint="hold the whole model in memory, without layerwise and work_dir, or give "
            "rotate: {residual: false}",
        )
    trace = context.trace()
    if trace is None:
        log.info("not rotated: there are no example inputs to trace the model on")
        return
    planned = {entry.module for entry in plan.entries}
    jobs = []
    for found in find_rotations(trace.flow):
        if not (heads if found.parts else residual):
            continue
        reason = found.reason or _outside(found, planned, context) or _unread(found, trace)
        job = reason if reason else _Job.of(model, found, context)
        if isinstance(job, _Job):
            jobs.append(job)
        else:
            level = logging.INFO if found.normalized and not found.parts else logging.DEBUG
            log.log(level, "not rotated: %d channels of %s: %s", found.size, found.name, job)
    if not jobs:
        return
    before, mark = _outputs(model, context), len(context.undo)
    remembered: set[str] = set()
    for job in jobs:
        job.apply(model, seed, context, remembered)
    problem = _difference(before, _outputs(model, context))
    if not problem:
        return
    if places_of(model):  # nothing was remembered; the files are what they were
        raise CalibrationError(
            f"rotate changed what the model computes: {problem}",
            hint="leave it out of the recipe, and report the model's architecture",
        )
    log.warning("not rotated, all is put back: %s", problem)
    for undo in reversed(context.undo[mark:]):
        undo()
    del context.undo[mark:]


def _outputs(model: nn.Module, context: CalibrationContext) -> Any:
    """Return what the model computes of its first batch, or the block that is calibrated now.

    ``None`` for a block whose inputs no step of the recipe asks for.
    """
    if context.only is None:
        return context.example()
    if context.block is None or not context.block.batches:
        return None
    with quantizers_off(model):
        return context.block.run(0)


def _outside(found: Rotatable, planned: set[str], context: CalibrationContext) -> str:
    """Return why channels do not concern what is calibrated now."""
    modules = {turn.member.module for turn in found.turns}
    if context.only is not None and not modules <= context.only:
        return "some of what has them is calibrated elsewhere"
    if not planned & {turn.member.module for turn in found.turns if turn.reads}:
        return "nothing that reads them is quantized"
    return ""


def _unread(found: Rotatable, trace: Trace) -> str:
    """Return which parameter, of what did not run, may have the channels, too."""
    graph = trace.flow.graph
    for name, tensor in trace.model.named_parameters():
        if not found.parts and found.size in tensor.shape and not graph.read(name):
            return f"{name} was not read with the example inputs, and may have them, too"
    return ""


@dataclass(frozen=True)
class _Job:
    """A rotation that can be done.

    Attributes:
        found: What is rotated.
        block: How many channels are rotated together.
        gains: The factors that move into the weights, on the CPU; those that are alike for all
            channels stay where they are.
    """

    found: Rotatable
    block: int
    gains: Mapping[Gain, Tensor]

    @staticmethod
    def of(model: nn.Module, found: Rotatable, context: CalibrationContext) -> _Job | str:
        """Return the job, or why it cannot be done."""
        block = found.size & -found.size
        if block < 2 + 2 * found.ones:
            return f"no power of two divides {found.size}"
        values = {gain: _factor(model, gain, context) for gain in found.gains}
        moving = {gain: value for gain, value in values.items() if bool((value != value[0]).any())}
        for turn in found.turns:
            sets = {tuple(g for g in gains if g in moving) for gains in turn.gains}
            name = f"{turn.member.module}.{turn.member.tensor}"
            if len(sets) > 1:
                gain = next(g for gains in sets for g in gains)
                return (
                    f"{gain.name} cannot move into {name}, which is read without it elsewhere; if "
                    "these are tied embeddings, give the head a weight of its own"
                )
            if turn.added and any(bool((moving[g] == 0).any()) for g in next(iter(sets))):
                return f"{name} is added to channels whose gain is 0"
        return _Job(found, block, moving)

    @torch.no_grad()
    def apply(
        self,
        model: nn.Module,
        seed: int,
        context: CalibrationContext,
        remembered: set[str],
    ) -> None:
        """Rotate all that has the channels, and make the gains 1.

        Args:
            model: The model.
            seed: Of the signs.
            context: Gives the weights.
            remembered: What can be put back already.
        """
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (self.found.size,), generator=generator) * 2.0 - 1
        if self.found.ones:
            signs[:: self.block] = 1
        for turn in self.found.turns:
            scale = torch.ones(self.found.size, dtype=torch.float64)
            for gain in turn.gains[0]:
                scale *= self.gains.get(gain, 1)
            scale = 1 / scale if turn.added else scale
            name = f"{turn.member.module}.{turn.member.tensor}"
            with _written(model, name, context, remembered) as tensor:
                self._rotate(tensor, turn.member, scale, signs)
        for gain in self.gains:
            with _written(model, gain.name, context, remembered) as tensor:
                tensor.fill_(1 - gain.offset)

    def _rotate(self, tensor: Tensor, member: Member, scale: Tensor, signs: Tensor) -> None:
        """Multiply the channels of a parameter by their scales, then by the rotation, in place."""
        index = member.index.T.to(tensor.device)
        channels = tensor.detach().movedim(member.dim, -1)
        found = channels[..., index].contiguous()
        work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        scale, signs = (v.to(tensor.device, work) for v in (scale, signs))
        size = max(1, _ELEMENTS // self.found.size)
        for rows in torch.split(found.view(-1, self.found.size), size):
            turned = rows.to(work) * scale
            if self.found.ones:
                turned = hadamard(turned, self.block)
            rows.copy_(hadamard(turned * signs, self.block))
        channels[..., index] = found


@contextmanager
def _written(
    model: nn.Module, name: str, context: CalibrationContext, remembered: set[str]
) -> Iterator[Tensor]:
    """Yield a parameter that can be written to, and put back after an error."""
    path, _, local = name.rpartition(".")
    holder = model.get_submodule(path)
    with context.access(holder, write=True):
        if name not in remembered:
            context.remember(holder, local)
            remembered.add(name)
        yield getattr(holder, local)


def _factor(model: nn.Module, gain: Gain, context: CalibrationContext) -> Tensor:
    """Return what a gain multiplies channels by, float64."""
    path, _, local = gain.name.rpartition(".")
    holder = model.get_submodule(path)
    with context.access(holder, write=False):
        vector: Tensor = getattr(holder, local).detach()
        return vector.double().flatten().cpu() + gain.offset


def _difference(before: Any, after: Any) -> str:
    """Return how far outputs are from what they were, if that is far; few rows may be, of experts.

    Args:
        before: What the model returned, in any structure; ``None`` if it was not run.
        after: What it returns now.
    """
    for one, two in zip(_floats(before), _floats(after), strict=True):
        limit = _LIMIT if one.dtype in (torch.float32, torch.float64) else _LIMIT_HALF
        errors = [
            (b.float() - a.float()).norm(dim=-1) / a.float().norm(dim=-1)
            for a, b in zip(*(torch.split(v.flatten(0, -2), 256) for v in (one, two)), strict=True)
        ]
        share = float((~(torch.cat(errors) <= limit)).float().mean())
        if share > _FEW:
            return f"{share:.0%} of the outputs change by more than {limit}"
    return ""


def _floats(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    found = [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]
    return [v for v in found if v.numel()]
