"""Distillation: a quantized model learns from the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bittern.convert import LiveNames
from bittern.errors import ModelError, TrainingError
from bittern.evaluation import logits_of
from bittern.records import ModelAdapter
from bittern.runtime import Batch, evaluating, prepare
from bittern.training.losses import divergence, predicted, relative_error, task_loss, valid

__all__ = ["Distillation"]


class Distillation:
    """The loss of a student against a teacher that is given the same batch.

    ``loss = logits_weight * KL(teacher || student) + hidden_weight * error + task_weight * task``,
    where the divergence is that of the softened distributions, times the squared temperature
    (arXiv:1503.02531, section 2), the error that of the hidden states, relative to the teacher's,
    as a mean over the modules, and the task the cross-entropy with labels, or next tokens.

    Padding does not count (``attention_mask``), nor do positions whose label is -100.

    The teacher is a second model: its weights, and its activations of one forward pass, take memory
    beside the student's. It needs no gradients and no optimizer, so bfloat16 and another device do:
    ``copy.deepcopy(model)`` before `quantize`, or `load` once more.

    Forward hooks take the hidden states; they are removed by `close`, or at the end of ``with``.

    Args:
        student: The model that is trained.
        teacher: A model with the same outputs; it is run in eval mode without gradients.
        hidden: Paths of modules whose outputs are compared, in both models; pairs where the names
            differ; ``"blocks"`` for the repeated blocks that the student's framework knows.
        temperature: Divides both sides' logits.
        logits_weight: Weight of the divergence; 0 leaves it out.
        hidden_weight: Weight of the hidden states' error.
        task_weight: Weight of the task's own loss.
        adapter: What the student's framework knows about it.

    Attributes:
        parts: The terms of the last loss by name, unweighted and detached.

    Raises:
        TrainingError: The temperature is not positive, or nothing is left to learn.
        ModelError: A module does not exist.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        hidden: Iterable[str | tuple[str, str]] | str = (),
        temperature: float = 1.0,
        logits_weight: float = 1.0,
        hidden_weight: float = 1.0,
        task_weight: float = 0.0,
        adapter: ModelAdapter | None = None,
    ) -> None:
        self.adapter = adapter if adapter is not None else ModelAdapter()
        if isinstance(hidden, str):
            hidden = self.adapter.blocks if hidden == "blocks" else (hidden,)
            if not hidden:
                raise TrainingError(
                    "no plugin knows the blocks of this model",
                    hint='give their paths, as hidden=["layers.0", "layers.1"]',
                )
        pairs = [(one, one) if isinstance(one, str) else one for one in hidden if hidden_weight]
        if temperature <= 0:
            raise TrainingError(f"the temperature is {temperature}", hint="give a positive number")
        if not (logits_weight or task_weight or pairs):
            raise TrainingError(
                "there is nothing to learn: every weight is 0",
                hint="give logits_weight, task_weight, or hidden modules and hidden_weight",
            )
        self.student, self.teacher = student, teacher
        self.temperature = temperature
        self.parts: Mapping[str, Tensor] = {}
        self._weights = {"logits": logits_weight, "hidden": hidden_weight, "task": task_weight}
        self._ours = _Outputs(student, [ours for ours, _ in pairs])
        self._theirs = _Outputs(teacher, [theirs for _, theirs in pairs])
        self._count = 0

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, a scalar in float32 on the student's device.

        Args:
            batch: Token ids, a mapping of arguments (``labels`` are taken out), or a tuple whose
                first item is the input.

        Raises:
            DataError: The batch is none, or there are no logits in an output.
            ModelError: A module did not run, or its output has no gradient.
        """
        ours = prepare(batch, self.student, self.adapter, index=self._count)
        theirs = prepare(batch, self.teacher, self.adapter, index=self._count)
        self._count += 1
        with evaluating(self.teacher), self._theirs:
            truth = logits_of(theirs.run(self.teacher), self.adapter)
        with self._ours:
            logits = logits_of(ours.run(self.student), self.adapter)
        terms = self._terms(logits, truth.to(logits.device), ours)
        self.parts = {name: term.detach() for name, term in terms.items()}
        return torch.stack([self._weights[name] * term for name, term in terms.items()]).sum()

    def _terms(self, logits: Tensor, truth: Tensor, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self._weights["logits"]:
            counted = predicted(logits, batch, self.adapter.causal)
            terms["logits"] = divergence(logits, truth, counted, temperature=self.temperature)
        if self._ours.paths:
            states = self._ours.take(trained=logits.requires_grad)
            errors = [
                relative_error(mine, other.to(mine.device), valid(mine, batch))
                for mine, other in zip(states, self._theirs.take(), strict=True)
            ]
            terms["hidden"] = torch.stack([error.to(logits.device) for error in errors]).mean()
        if self._weights["task"]:
            terms["task"] = task_loss(logits, batch, self.adapter.causal)
        return terms

    def close(self) -> None:
        """Remove the hooks."""
        self._ours.close()
        self._theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Outputs:
    """Keeps the outputs of chosen modules, within ``with``, until they are taken."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.paths = paths
        self._found: dict[str, Tensor] = {}
        self._open = False
        names = LiveNames(model)
        live = {names.saved(name): module for name, module in model.named_modules()}
        missing = [path for path in paths if path not in live]
        if missing:
            raise ModelError(
                f"there is no module {missing[0]!r} to take hidden states from",
                hint=f"its modules are called {', '.join(list(live)[1:4])}, ..",
            )
        self._handles = [
            live[path].register_forward_hook(self._hook(path)) for path in dict.fromkeys(paths)
        ]

    def _hook(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not self._open:  # another pass, or activation checkpointing runs this one again
                return
            first = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(first, Tensor):
                raise ModelError(
                    f"it returns a {type(output).__name__}, not hidden states",
                    where=path,
                    hint="choose a module that returns a tensor, or one first in a tuple",
                )
            self._found[path] = first

        return hook

    def take(self, *, trained: bool = False) -> list[Tensor]:
        """Return the outputs in the order of ``paths``, and forget them.

        Args:
            trained: Whether they must have gradients.

        Raises:
            ModelError: A module did not run, or its output has no gradient.
        """
        missing = [path for path in self.paths if path not in self._found]
        if missing:
            raise ModelError(
                "it did not run, so it has no hidden state",
                where=missing[0],
                hint="choose a module that every forward pass calls",
            )
        found = [self._found[path] for path in self.paths]
        self._found = {}
        for path, state in zip(self.paths, found, strict=True):
            if trained and not state.requires_grad:
                raise ModelError(
                    "its hidden state has no gradient",
                    where=path,
                    hint="checkpoint activations with use_reentrant=False, or choose a module "
                    "behind trained weights",
                )
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> None:
        self._found = {}
        self._open = True

    def __exit__(self, *_: object) -> None:
        self._open = False
