"""Small floats under one linear scale."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics.codec import Codec, Scales, linear_scale
from bittern.numerics.grids import GRIDS, FloatGrid

__all__ = ["FloatCodec", "GridCodec"]


class GridCodec(Codec):
    """A codec whose elements are small floats; subclasses say by which rule they are scaled."""

    @property
    @abstractmethod
    def grid(self) -> FloatGrid:
        """The numbers that a code can stand for."""

    @property
    def max_value(self) -> float:  # type: ignore[override]
        """Largest number of the grid."""
        return self.grid.max_value

    @property
    def storage(self) -> torch.dtype:  # type: ignore[override]
        """The float8 dtype, or uint8 with the bits of one code."""
        return self.grid.storage

    def round_(self, values: Tensor) -> Tensor:
        """Clamp and round to the grid."""
        return self.grid.round_(values)

    def store(self, values: Tensor) -> Tensor:
        """Return grid values as codes."""
        return self.grid.encode(values)

    def load(self, codes: Tensor) -> Tensor:
        """Return codes as float32 (exact)."""
        return self.grid.decode(codes)


@dataclass(frozen=True)
class FloatCodec(GridCodec):
    """A float8 grid, scale ``amax / max`` (OCP OFP8; subnormals kept, saturating).

    Args:
        dtype: Name of the torch dtype: ``"float8_e4m3fn"`` (largest value 448) or
            ``"float8_e5m2"`` (57344).
    """

    dtype: str = "float8_e4m3fn"

    def __post_init__(self) -> None:
        if self.dtype not in _BY_DTYPE:
            raise NumericsError(
                f"there is no float8 grid {self.dtype!r}", hint=f"known are {', '.join(_BY_DTYPE)}"
            )

    @property
    def grid(self) -> FloatGrid:
        """The numbers of the dtype."""
        return _BY_DTYPE[self.dtype]

    def scales(self, amax: Tensor, global_scale: Tensor | None = None) -> Scales:
        """Return ``amax / max_value``."""
        return Scales(linear_scale(amax, self.max_value))


_BY_DTYPE = {
    str(grid.dtype).removeprefix("torch."): grid
    for grid in GRIDS.values()
    if grid.dtype is not None
}
