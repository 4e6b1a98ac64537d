"""What a calibration algorithm is given besides the model and the plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from bittern.nn.observer import SharedInputs
from bittern.runtime import SILENT, Progress
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
        progress: Shows where long work is.
        undo: What to call, the last one first, if this or a later step fails: a step that changes
            weights appends what puts them back.
    """

    shared: SharedInputs
    access: Callable[..., AbstractContextManager[None]]
    trace: Callable[[], Trace | None] = lambda: None
    progress: Progress = SILENT
    undo: list[Callable[[], None]] = field(default_factory=list)
