"""Runs data through a model, and through the same model with every quantizer off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from bittern.errors import DataError
from bittern.evaluation.fold import folded_weights
from bittern.evaluation.metrics import Divergence, NextToken, Sqnr, TopOne
from bittern.nn import QuantModule, named_quant_modules, quantizers_off
from bittern.records import Evaluation, LayerError, ModelAdapter
from bittern.runtime import SILENT, Batch, Progress, evaluating, length_of, prepare

__all__ = ["logits_of", "run_evaluation"]


def run_evaluation(
    model: nn.Module,
    data: Iterable[Any],
    *,
    adapter: ModelAdapter,
    reference: bool = True,
    layers: bool = True,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measure perplexity or accuracy, and what quantization changed.

    Args:
        model: A plain or a quantized model; it is run in eval mode and left as it was.
        data: Batches: token ids, ``(input, label)`` pairs, mappings, or plain inputs.
        adapter: What the model's framework knows.
        reference: Whether to run the model a second time with its quantizers off.
        layers: Whether to measure each quantized module's own output error, on the first batch.
        progress: Shows where it is.

    Raises:
        DataError: There is no batch.
    """
    start = time.perf_counter()
    quantized = any(True for _ in named_quant_modules(model))
    reference = reference and quantized
    ours, theirs = _Tally(adapter.causal), _Tally(adapter.causal)
    kl, output = Divergence(), Sqnr()
    errors: dict[str, Sqnr] = {}
    samples = count = 0
    raw: Any
    with evaluating(model), ExitStack() as folded:
        switch: Callable[[bool], None] | None = None
        for raw in progress.track(data, "evaluating", total=length_of(data)):
            batch = prepare(raw, model, adapter, index=count)
            if quantized and layers and count == 0:
                errors = _layer_errors(model, batch)
            if quantized and switch is None:
                switch = folded.enter_context(folded_weights(model))
            logits = logits_of(batch.run(model), adapter)
            ours.add(logits, batch)
            if reference and switch is not None:
                switch(False)
                with quantizers_off(model):
                    truth = logits_of(batch.run(model), adapter)
                switch(True)
                theirs.add(truth, batch)
                output.add(truth, logits)
                if truth.dim() > 1:
                    kl.add(truth, logits)
            samples += batch.rows
            count += 1
    if count == 0:
        raise DataError("the evaluation data holds no batch")
    return Evaluation(
        perplexity=ours.tokens.perplexity,
        tokens=ours.tokens.tokens,
        accuracy=ours.classes.accuracy,
        samples=samples,
        reference_perplexity=theirs.tokens.perplexity if reference else None,
        reference_accuracy=theirs.classes.accuracy if reference else None,
        kl=kl.mean if reference else None,
        output_sqnr_db=output.db if reference else None,
        layers=_sorted(errors),
        seconds=time.perf_counter() - start,
    )


class _Tally:
    """Perplexity and accuracy of one run, whichever the data allows."""

    def __init__(self, causal: bool | None) -> None:
        self._causal = causal
        self.tokens = NextToken()
        self.classes = TopOne()

    def add(self, logits: Tensor, batch: Batch) -> None:
        ids = batch.ids
        label = batch.targets[0] if batch.targets else None
        matches = (
            ids is not None
            and logits.dim() == 3
            and logits.shape[:2] == ids.shape
            and int(ids.max()) < logits.shape[-1]  # else the classes are no tokens
        )
        if matches and self._causal is not False:
            assert ids is not None
            self.tokens.add(logits, ids, batch.mask)
        elif (
            isinstance(label, Tensor)
            and not label.is_floating_point()
            and label.shape == logits.shape[:-1]
        ):
            self.classes.add(logits, label)


def logits_of(output: Any, adapter: ModelAdapter) -> Tensor:
    """Return the tensor in a model's output that metrics are about.

    Raises:
        DataError: The output holds no tensor that could be meant.
    """
    found = adapter.logits(output) if adapter.logits is not None else output
    if isinstance(found, Mapping):
        found = found.get("logits", next(iter(found.values()), None))
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise DataError(
            f"cannot find logits in a {type(output).__name__}",
            hint="let the model return a tensor, or write an adapter that takes the logits out",
        )
    return found


def _layer_errors(model: nn.Module, batch: Batch) -> dict[str, Sqnr]:
    """Measure each module on its own: same input, its quantizers on against off."""
    errors: dict[str, Sqnr] = {}
    handles = []
    repeating = False

    def watch(path: str) -> Any:
        errors[path] = Sqnr()

        def hook(module: QuantModule, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal repeating
            if repeating:  # inside a quantized module that is run once more without quantizers
                return
            repeating = True
            try:
                with quantizers_off(module):
                    truth = type(module).forward(module, *args, **kwargs)
            finally:
                repeating = False
            if isinstance(output, tuple):
                output, truth = output[0], truth[0]
            if isinstance(output, Tensor):
                errors[path].add(truth, output)

        return hook

    try:
        for path, module in named_quant_modules(model):
            if not module.slots():  # it only calls its quantized children
                continue
            hook = watch(path)  # before hooks of others, which may change the output
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return errors


def _sorted(errors: Mapping[str, Sqnr]) -> tuple[LayerError, ...]:
    found = [
        LayerError(module=path, sqnr_db=e.db) for path, e in errors.items() if e.db is not None
    ]
    return tuple(sorted(found, key=lambda e: (e.sqnr_db, e.module)))
