"""Training a quantized model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from bittern.toolkit import Toolkit, toolkit_or_default

if TYPE_CHECKING:
    from torch import nn

    from bittern.training import Distillation, RangeTraining
    from bittern.training.kinds import Activations, Weights

__all__ = ["distill", "train_ranges"]


def train_ranges(
    model: nn.Module,
    *,
    weights: Weights = "follow",
    activations: Activations = "fixed",
    ranges: Mapping[str, str] | None = None,
    decay: float = 0.99,
    toolkit: Toolkit | None = None,
) -> RangeTraining:
    """Say what the ranges of a quantized model do while it is trained.

    Call it on the calibrated model, before it is wrapped (DDP, FSDP) and before the optimizer is
    made, and ``step()`` of what it returns after every step of the optimizer.

    Args:
        model: A quantized model; what is dynamic stays so.
        weights: ``"follow"``: the range of a weight is that of its present values; ``"learned"``:
            a parameter (LSQ); ``"fixed"``: as calibrated.
        activations: ``"fixed"``; ``"ema"``: an exponential mean of what the batches hold; or
            ``"learned"``.
        ranges: Quantizers that are to do otherwise, pattern of their names to one of those words;
            the last that matches wins.
        decay: How much of the mean is kept in a step of ``"ema"``, from 0 to 1.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        TrainingError: A word or the decay is none that is known, a pattern matches nothing, or the
            model has no quantizers.
        CalibrationError: A static range was not calibrated.
        NumericsError: A range cannot be learned; names the quantizer.
    """
    from bittern.training import train_ranges as start

    return start(
        model,
        weights=weights,
        activations=activations,
        ranges=ranges,
        decay=decay,
        access=toolkit_or_default(toolkit).access,
    )


def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    hidden: Iterable[str | tuple[str, str]] | str = (),
    temperature: float = 1.0,
    logits_weight: float = 1.0,
    hidden_weight: float = 1.0,
    task_weight: float = 0.0,
    toolkit: Toolkit | None = None,
) -> Distillation:
    """Compare a quantized model with a teacher, usually itself before quantization.

    ``with bt.distill(student, teacher) as distillation: loss = distillation.loss(batch)``.

    Args:
        student: The model that is trained.
        teacher: A model with the same outputs; it is run in eval mode without gradients.
        hidden: Paths of modules whose outputs are compared too; ``"blocks"`` for the repeated
            blocks that the student's framework knows.
        temperature: Divides both sides' logits.
        logits_weight: Weight of the divergence of the logits.
        hidden_weight: Weight of the error of the hidden states.
        task_weight: Weight of the task's own loss.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        TrainingError: The temperature is not positive, or nothing is left to learn.
        ModelError: A module does not exist.
    """
    from bittern.training import Distillation

    return Distillation(
        student,
        teacher,
        hidden=hidden,
        temperature=temperature,
        logits_weight=logits_weight,
        hidden_weight=hidden_weight,
        task_weight=task_weight,
        adapter=toolkit_or_default(toolkit).adapter(student),
    )
