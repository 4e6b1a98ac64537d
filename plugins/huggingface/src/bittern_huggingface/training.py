"""Training a quantized model with the Trainer of transformers: its ranges, and a teacher.

`QuantizationCallback` is all that any Trainer needs. `QuantizationMixin` adds to a Trainer's class
what no callback can do: a group of the optimizer for learned ranges, and the loss of distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import bittern
from bittern.checkpoint.tensors import load_quantizers, quantizer_tensors
from bittern.checkpoint.witness import WITNESS, check_witness
from bittern.errors import CheckpointError, TrainingError
from bittern.nn import named_quantizers, quantizer_keys
from bittern.reading import load_tensors
from bittern.training import Distillation, RangeTraining
from bittern_huggingface.state import BESIDE, TENSORS, inner_model

__all__ = ["QuantizationCallback", "QuantizationMixin", "QuantizationTrainer"]


class QuantizationCallback(TrainerCallback):  # type: ignore[misc]
    """Drives the ranges of a quantized model while a Trainer trains it, and saves its state.

    Every checkpoint of the Trainer gets a directory ``bittern`` with the state of the quantizers,
    beside the weights that the Trainer saves. `Trainer.train` resumes from both. When training
    ends the ranges are static again, and the final state is in ``output_dir/bittern``: after
    ``trainer.save_model()``, ``bittern.load(output_dir)`` gives the trained, quantized model.

    Args:
        ranges: What `bittern.training.train_ranges` returned for the model, before the Trainer was
            made; ``None``: all ranges stay as they are.
        resume_from: The checkpoint that training is resumed from, where it is none of
            ``output_dir``.
        finish: Whether the ranges are made static when training ends.
    """

    def __init__(
        self,
        ranges: RangeTraining | None = None,
        *,
        resume_from: str | Path | None = None,
        finish: bool = True,
    ) -> None:
        self.ranges = ranges
        self.resume_from = resume_from
        self.finish = finish

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Take the ranges of the checkpoint that is resumed.

        Raises:
            TrainingError: The model is sharded.
            CheckpointError: The checkpoint has no such state, or of another model.
        """
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise TrainingError(
                "the callback does not save the quantizers of a sharded model",
                hint="train with DDP, or write the loop yourself and call bittern.save",
            )
        _keep_ranges_out_of_files(model)
        if state.global_step:
            given = self.resume_from or args.resume_from_checkpoint
            if not isinstance(given, str | Path):
                given = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _load_ranges(model, Path(given) / BESIDE)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Bring the ranges up to date."""
        if self.ranges is not None:
            self.ranges.step()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Put the state of the quantizers into the checkpoint."""
        _save_beside(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Take the ranges of the best checkpoint with its weights, make them static, save them."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:
            _load_ranges(model, Path(best) / BESIDE)
        if self.ranges is not None and self.finish:
            self.ranges.finish()
        _save_beside(model, Path(args.output_dir))


class QuantizationMixin:
    """Trains quantized models in a class that derives from this one and a Trainer, in this order.

    Args:
        args: As the Trainer's.
        ranges: As for `QuantizationCallback`, which the mixin adds.
        distillation: Gives the loss of training; evaluation reports the task's own. Its teacher is
            moved to the Trainer's device.
        range_learning_rate: Learning rate of learned ranges; that of the weights by default.
        resume_from: As for `QuantizationCallback`.
        kwargs: As the Trainer's.
    """

    optimizer: Any
    args: Any

    def __init__(
        self,
        *args: Any,
        ranges: RangeTraining | None = None,
        distillation: Distillation | None = None,
        range_learning_rate: float | None = None,
        resume_from: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self.range_learning_rate = range_learning_rate
        callback = QuantizationCallback(ranges, resume_from=resume_from)
        trainer: Any = self
        trainer.add_callback(callback)
        if distillation is not None:
            distillation.teacher.to(self.args.device)
            # The loss is the mean of a micro-batch, whatever the model's own loss takes.
            trainer.model_accepts_loss_kwargs = False
            trainer.loss_is_scaled_for_ga = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, with learned ranges in a group of their own, without weight decay."""
        trainer: Any = super()
        made_before = self.optimizer is not None
        optimizer: torch.optim.Optimizer = trainer.create_optimizer(model)
        if not made_before:
            trained: Any = model if model is not None else self.model  # type: ignore[attr-defined]
            _set_apart(optimizer, trained, self.range_learning_rate)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of distillation in training, and the task's own in evaluation."""
        if self.distillation is None or return_outputs or not model.training:
            trainer: Any = super()
            return trainer.compute_loss(model, inputs, return_outputs, **kwargs)
        self.distillation.student = model  # as it is wrapped now: DDP adds gradients up
        return self.distillation.loss(inputs)


class QuantizationTrainer(QuantizationMixin, Trainer):  # type: ignore[misc]
    """The Trainer of transformers for quantized models, see `QuantizationMixin`."""


def _set_apart(
    optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float | None
) -> None:
    """Move learned ranges into a last group of the optimizer."""
    keys = quantizer_keys(model)
    ranges = {id(p): p for n, p in model.named_parameters() if n in keys and p.requires_grad}
    if not ranges:
        return
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ranges]
    group = {"params": list(ranges.values()), "weight_decay": 0.0}
    if learning_rate is not None:
        group["lr"] = learning_rate
    optimizer.add_param_group(group)


def _keep_ranges_out_of_files(model: nn.Module) -> None:
    """Tell transformers that learned ranges are not the model's; ``from_pretrained`` would warn."""
    inner: Any = inner_model(model)
    if inner is not None:
        known = inner._keys_to_ignore_on_save or ()
        inner._keys_to_ignore_on_save = sorted({*known, *quantizer_keys(inner)})


def _save_beside(model: nn.Module, checkpoint: Path) -> None:
    """Write the state of the quantizers into a directory that holds the weights, on all ranks."""
    bittern.save(model, checkpoint / BESIDE, state_only=True, overwrite=True)


@torch.no_grad()
def _load_ranges(model: nn.Module, path: Path) -> None:
    """Give the quantizers of a model, as they are, what was saved of them.

    Learned ranges stay the very parameters that the optimizer holds.

    Raises:
        CheckpointError: There is nothing, or it is the state of other weights or quantizers.
    """
    if not path.is_dir():
        raise CheckpointError(
            "the checkpoint that is resumed has no state of quantizers",
            where=str(path),
            hint="say which one it is: QuantizationCallback(ranges, resume_from=...)",
        )
    found = load_tensors(path / TENSORS, error=CheckpointError, within=path)
    check_witness(model, {n: t for n, t in found.items() if n.startswith(WITNESS)}, where=str(path))
    saved = {name: tensor for name, tensor in found.items() if not name.startswith(WITNESS)}
    ours = quantizer_tensors(model)
    other = sorted(saved.keys() ^ ours.keys())
    other += [name for name in saved.keys() & ours.keys() if saved[name].shape != ours[name].shape]
    if other:
        raise CheckpointError(
            f"it is the state of a model that was quantized otherwise: {other[0]}",
            where=str(path),
            hint="quantize the model, and call train_ranges, as for the run that is resumed",
        )
    held = {q: q.learned for _, q in named_quantizers(model) if q.learned is not None}
    load_quantizers(model, saved)
    for quantizer, parameter in held.items():
        if quantizer.learned is not None:
            parameter.copy_(quantizer.learned)
            quantizer.amax = parameter
