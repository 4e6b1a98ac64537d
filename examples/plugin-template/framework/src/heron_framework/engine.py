"""The engine that serves the framework's models, from one file with names of its own."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

FILE = "engine.safetensors"
SCALE = ".scale"


def load(path: Path) -> dict[str, Tensor]:
    """Return every weight by the engine's name: codes times their scales, float32."""
    stored = load_file(path / FILE)
    weights = {}
    for name, tensor in stored.items():
        if not name.endswith(SCALE):
            scale = stored.get(name + SCALE)
            weights[name] = tensor if scale is None else tensor.float() * scale
    return weights
