"""Grids of small floats: fp8 with torch's dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.numerics.codec import Codec, Scales, linear_scale

__all__ = ["FloatCodec"]


@dataclass(frozen=True)
class FloatCodec(Codec):
    """A torch float8 grid, scale ``amax / max`` (OCP OFP8; subnormals kept, saturating).

    Args:
        dtype: Name of the torch dtype.
    """

    dtype: str = "float8_e4m3fn"

    @property
    def max_value(self) -> float:  # type: ignore[override]
        """Largest finite value: 448 for e4m3fn, 57344 for e5m2."""
        return float(torch.finfo(self.storage).max)

    @property
    def storage(self) -> torch.dtype:  # type: ignore[override]
        """The float8 dtype itself."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def scales(self, amax: Tensor) -> Scales:
        """Return ``amax / max_value``."""
        return Scales(linear_scale(amax, self.max_value))

    def round_(self, values: Tensor) -> Tensor:
        """Clamp and round to the grid; adding 0 turns -0 into +0."""
        limit = self.max_value
        rounded = values.clamp_(-limit, limit).to(self.storage)
        return values.copy_(rounded).add_(0.0)

    def store(self, values: Tensor) -> Tensor:
        """Return grid values in the float8 dtype (exact)."""
        return values.to(self.storage)

    def load(self, codes: Tensor) -> Tensor:
        """Return float8 codes as float32 (exact)."""
        return codes.float()
