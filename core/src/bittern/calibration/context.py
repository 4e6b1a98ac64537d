"""What a calibration algorithm is given besides the model and the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bittern.calibration.replay import BlockRun
from bittern.nn import QuantModule, TensorQuantizer, named_quant_modules, quantizers_of
from bittern.nn.observer import SharedInputs
from bittern.runtime import SILENT, Progress
from bittern.runtime.ondisk import on_disk
from bittern.tracing import Trace

__all__ = ["CalibrationContext", "Forward"]

# Runs all data through the model once and returns the number of batches.
Forward = Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class CalibrationContext:
    """Services for an algorithm.

    Attributes:
        shared: Deduplicates statistics of shared inputs and knows the running batch.
        access: Makes a module's weights real tensors: ``with access(module, write=False): ...``.
        trace: Traces the model on the first batch, once; ``None`` where there is no batch to run
            it on, or it does not run.
        example: Runs the unquantized model on that batch and returns what it returns; ``None``
            likewise.
        progress: Shows where long work is.
        only: Paths of the modules that are calibrated now, those of the plan; ``None`` for all.
        block: The block that is calibrated and its inputs, in steps of the kind ``sequential``;
            ``None`` for what is in no block.
        originals: Parameters of the model as they were before the first step, by name, for a step
            that takes the model as a whole and needs ``original``; empty if it is the first.
        undo: What to call, the last one first, if this or a later step fails: a step that changes
            weights appends what puts them back.
        unseen_experts: Name of a quantizer to experts that no token went through, for the report;
            see `bittern.calibration.coverage`.
        saturation: Name of a quantizer to the share of the data beyond its range, likewise.
    """

    shared: SharedInputs
    access: Callable[..., AbstractContextManager[None]]
    trace: Callable[[], Trace | None] = lambda: None
    example: Callable[[], Any] = lambda: None
    progress: Progress = SILENT
    only: frozenset[str] | None = None
    block: BlockRun | None = None
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)
    unseen_experts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    saturation: dict[str, float] = field(default_factory=dict)

    def modules(self, model: nn.Module) -> Iterator[tuple[str, QuantModule]]:
        """Yield ``(path, module)`` of the modules that are calibrated now."""
        for path, module in named_quant_modules(model):
            if self.only is None or path in self.only:
                yield path, module

    def quantizers(self, model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
        """Yield ``("module.path.slot", quantizer)`` of the quantizers that are calibrated now."""
        for path, module in self.modules(model):
            yield from quantizers_of(path, module)

    def quantizer(self, model: nn.Module, path: str, slot: str) -> TensorQuantizer | None:
        """Return the quantizer of a module that is calibrated now.

        Args:
            model: The model.
            path: Path of a module, or the name of a tensor, which has none.
            slot: The slot.
        """
        if self.only is not None and path not in self.only:
            return None
        try:
            module = model.get_submodule(path)
        except AttributeError:  # a tensor of a module with several
            return None
        return module.quantizer(slot) if isinstance(module, QuantModule) else None

    def remember(self, module: nn.Module, tensor: str) -> None:
        """Keep a copy of a parameter that is about to be written to, for `undo`.

        Args:
            module: The module, within ``access(module, write=True)``.
            tensor: Name of its parameter.
        """
        if on_disk(module):  # what is there stays as it is
            return
        before: Tensor = getattr(module, tensor).detach().clone()

        def undo() -> None:
            with self.access(module, write=True), torch.no_grad():
                getattr(module, tensor).copy_(before)

        self.undo.append(undo)
