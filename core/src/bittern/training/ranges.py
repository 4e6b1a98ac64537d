"""What the ranges of a quantized model do while it is trained.

Ranges change in `RangeTraining.step`, between optimizer steps, and never in a forward pass. So the
forward pass that activation checkpointing runs again sees the very ranges of the first, compiled
code has nothing to guard, every micro-batch of an accumulated step is quantized alike, and at any
time the model can be evaluated, copied, saved and exported as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import nn

from bittern.errors import CalibrationError, NumericsError, TrainingError
from bittern.nn import QuantModule, TensorQuantizer, named_quant_modules
from bittern.runtime.access import resident
from bittern.training.following import FollowedWeights
from bittern.training.kinds import Activations, Weights
from bittern.training.means import RunningMeans

__all__ = ["RangeTraining", "train_ranges"]

Access = Callable[..., AbstractContextManager[None]]


def train_ranges(
    model: nn.Module,
    *,
    weights: Weights = "follow",
    activations: Activations = "fixed",
    ranges: Mapping[str, str] | None = None,
    decay: float = 0.99,
    access: Access = resident,
    group: Any = None,
) -> RangeTraining:
    """Say what the ranges of a quantized model do while it is trained.

    Call it on the calibrated model, before it is wrapped (DDP, FSDP) and before the optimizer is
    made, since learned ranges become parameters.

    Args:
        model: A quantized model; what is dynamic stays so.
        weights: ``"follow"``: the range of a weight is that of its present values, clipped as
            calibration clipped it; ``"learned"``: a parameter (LSQ); ``"fixed"``: as calibrated.
        activations: ``"fixed"``: as calibrated; ``"ema"``: an exponential mean of the largest
            magnitudes of the batches, which starts at the calibrated range; ``"learned"``: a
            parameter.
        ranges: Quantizers that are to do otherwise: pattern of their names
            (``"*.down_proj.input"``) to one of the words above; the last that matches wins.
        decay: How much of the mean is kept in a step of ``"ema"``, from 0 to 1.
        access: Makes the weights of a module real, called as ``access(module, write=False)``.
        group: Process group of the ranks that run different data; all ranks by default.

    Raises:
        TrainingError: A word or the decay is none that is known, a pattern matches nothing, or the
            model has no quantizers.
        CalibrationError: A static range was not calibrated.
        NumericsError: A range cannot be learned; names the quantizer.
    """
    if not 0 <= decay < 1:
        raise TrainingError(f"decay is {decay!r}", hint="give a number from 0 to less than 1")
    chosen = _choose(model, {"weight": weights, "activation": activations}, ranges or {})
    return RangeTraining(chosen, decay=decay, access=access, group=group)


class RangeTraining:
    """Keeps the ranges of a model up to date while it is trained; made by `train_ranges`.

    Attributes:
        behavior: Name of a quantizer to ``"fixed"``, ``"follow"``, ``"ema"`` or ``"learned"``.
    """

    def __init__(
        self,
        chosen: list[tuple[QuantModule, TensorQuantizer, str]],
        *,
        decay: float,
        access: Access,
        group: Any,
    ) -> None:
        self.behavior: Mapping[str, str] = {q.name: word for _, q, word in chosen}
        self._weights = FollowedWeights([(m, q) for m, q, w in chosen if w == "follow"], access)
        self._learned = [q for _, q, word in chosen if word == "learned"]
        _learn(self._learned)
        self._means = RunningMeans([q for _, q, w in chosen if w == "ema"], decay, group)
        self._frozen = self._finished = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the learned ranges: a group of the optimizer without weight decay.

        They are among ``model.parameters()`` too.
        """
        for quantizer in self._learned:
            if quantizer.learned is not None:
                yield quantizer.learned

    def parameter_groups(self, relative_lr: float) -> list[dict[str, Any]]:
        """Return the learned ranges as groups of an optimizer, without weight decay.

        Adam moves a parameter by about its learning rate, whatever the gradient, and ranges are as
        different as weights of 0.1 and activations of 100 are. So each has a rate of its own.

        Args:
            relative_lr: Learning rate in units of the mean range of a quantizer.
        """
        return [
            {"params": [p], "lr": relative_lr * float(p.detach().abs().mean()), "weight_decay": 0.0}
            for p in self.parameters()
        ]

    def step(self) -> None:
        """Bring ranges up to date; call it after every step of the optimizer, on every rank.

        Raises:
            TrainingError: Training is finished.
        """
        if self._finished:
            raise TrainingError("training is finished", hint="call train_ranges again")
        if not self._frozen:
            self._means.step()
            self._weights.step()

    def freeze(self) -> None:
        """Keep every range as it is from now on, while the weights are trained further."""
        self._frozen = True
        self._means.stop()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def finish(self) -> None:
        """Make all ranges static again, those that follow weights that of the final ones.

        Raises:
            NumericsError: A weight or a range holds NaN or Inf; names the quantizer.
        """
        if self._finished:
            return
        if not self._frozen:
            self._weights.step(check=True)
        _make_static(self._learned)
        self._means.stop()
        self._finished = True

    def __repr__(self) -> str:
        counts = Counter(self.behavior.values())
        state = "finished" if self._finished else "frozen" if self._frozen else "training"
        return f"<RangeTraining {state}: {', '.join(f'{n} {w}' for w, n in counts.items())}>"


def _learn(quantizers: list[TensorQuantizer]) -> None:
    """Make all ranges parameters, or none of them."""
    static = [quantizer for quantizer in quantizers if quantizer.learned is None]
    try:
        for quantizer in static:
            quantizer.learn()
    except NumericsError:
        _make_static(static)
        raise


def _make_static(quantizers: list[TensorQuantizer]) -> None:
    for quantizer in quantizers:
        values = quantizer.range
        if quantizer.learned is not None and values is not None:
            quantizer.set_range(values)


def _choose(
    model: nn.Module, default: Mapping[str, str], ranges: Mapping[str, str]
) -> list[tuple[QuantModule, TensorQuantizer, str]]:
    """Return every quantizer that has a static range, its module, and what the range does."""
    known = {"weight": get_args(Weights), "activation": get_args(Activations)}
    every = [(m, q) for _, m in named_quant_modules(model) for q in m.slots().values()]
    if not every:
        raise TrainingError(
            "this model has no quantizers", hint="call bittern.quantize(model, recipe) first"
        )
    for pattern in ranges:
        if not any(fnmatchcase(q.name, pattern) for _, q in every):
            raise TrainingError(
                f"no quantizer is called {pattern!r}", hint=f"one is called {every[0][1].name!r}"
            )
    chosen: list[tuple[QuantModule, TensorQuantizer, str]] = []
    for module, root in every:
        kind = "activation" if root.tensor is None else "weight"
        word = default[kind]
        for pattern, other in ranges.items():
            word = other if fnmatchcase(root.name, pattern) else word
        if word not in known[kind]:
            raise TrainingError(
                f"the range of the {kind} {root.name} cannot be {word!r}",
                hint=f"write {' or '.join(known[kind])}",
            )
        chain = [root] if word == "follow" else root.chain()  # a weight's chain follows as a whole
        for link in chain:
            if link.spec.dynamic or link.spec.constant_amax is not None:
                continue
            if not link.calibrated:
                raise CalibrationError(
                    "its range is not known yet",
                    where=link.name,
                    hint="calibrate the model before it is trained",
                )
            chosen.append((module, link, word))
    return chosen
