"""What a mode is given to work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from bittern.records import CalibrationSummary, ModelAdapter, ModuleRule, Plan
from bittern.registry import ClassTable, Registry
from bittern.runtime import SILENT, Progress

__all__ = ["ModeContext", "Steps"]


class Steps(Protocol):
    """The steps that a mode can take: a `bittern.Toolkit`."""

    @property
    def registry(self) -> Registry:
        """What the plugins registered."""
        ...

    def rules(self, model: nn.Module) -> ClassTable[ModuleRule]:
        """Return the module rules, those that only the live model shows included."""
        ...

    def adapter(self, model: nn.Module) -> ModelAdapter:
        """Return what the model's framework knows about it."""
        ...

    def access(self, module: nn.Module, *, write: bool) -> AbstractContextManager[None]:
        """Return a context manager within which the module's weights are real tensors."""
        ...

    def plan(self, model: nn.Module, recipe: Any, *, overrides: Sequence[str] = ()) -> Plan:
        """Decide who is quantized how; change nothing."""
        ...

    def convert(self, model: nn.Module, plan: Plan) -> None:
        """Swap classes and attach quantizers, in place."""
        ...

    def calibrate(
        self, model: nn.Module, plan: Plan, data: Any, *, progress: Progress | None = None
    ) -> CalibrationSummary:
        """Run the plan's algorithms."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModeContext:
    """What ``convert`` and ``restore`` of a mode are given.

    Attributes:
        toolkit: The steps, and what the plugins registered.
        data: Batches, or a function that runs the model; ``None`` where the user gave none.
        data_config: How ``data`` was read, as plain data, for the manifest.
        progress: Shows where long work is.
    """

    toolkit: Steps
    data: Any = None
    data_config: Mapping[str, object] | None = None
    progress: Progress = SILENT
