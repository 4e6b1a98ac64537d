"""A quantized model and its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]


@pytest.fixture
def exported(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor], tmp_path: Path
) -> tuple[Any, Path]:
    """A quantized MLP and its checkpoint."""
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    toolkit.export(model, tmp_path / "out")
    return model, tmp_path / "out"
