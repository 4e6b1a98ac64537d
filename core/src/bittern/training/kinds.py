"""What a range may do in training."""

from __future__ import annotations

from typing import Literal

__all__ = ["Activations", "Weights"]

Weights = Literal["fixed", "follow", "learned"]
Activations = Literal["fixed", "ema", "learned"]
