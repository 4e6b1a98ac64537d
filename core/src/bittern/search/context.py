"""What a search is given to work with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from bittern.config import Recipe, RecipeLike
from bittern.modes import Steps
from bittern.records import DataConfig
from bittern.report import Result
from bittern.runtime import Progress
from bittern.tracing import Trace

__all__ = ["SearchSteps"]


class SearchSteps(Steps, Protocol):
    """The steps that a search takes: a `bittern.Toolkit`."""

    def recipe(self, recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
        """Return a whole recipe."""
        ...

    def trace(self, model: nn.Module, example_inputs: Any = None) -> Trace:
        """Find which tensors of a model belong together."""
        ...

    def data(self, source: Any, model: nn.Module, config: DataConfig | None = None) -> Any:
        """Turn a path or name into batches; anything else is taken to be data already."""
        ...

    def quantize(
        self, model: nn.Module, recipe: Any, data: Any = None, *, progress: Progress | None = None
    ) -> Result:
        """Plan, convert and calibrate."""
        ...
