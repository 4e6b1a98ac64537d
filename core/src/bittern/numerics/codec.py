"""Codecs: the element grids of the number formats and their scales.

A codec is pure: tensors in, tensors out, all arithmetic in float32. `quantize`, `dequantize` and
`fake_quantize` (quantize.py) are written on top of it once for all formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.records import NumberFormat
from bittern.registry.targets import bound

__all__ = ["Codec", "FloatCodec", "IntCodec", "Scales", "codec_of"]

# Smallest positive float32; a scale that underflows is clamped to it, never 0 (numerics.md).
SMALLEST = 2.0**-149


@dataclass(frozen=True)
class Scales:
    """The scales of one tensor, float32, in the shape its granularity gives.

    Attributes:
        scale: What one code step is worth.
    """

    scale: Tensor


class Codec(Protocol):
    """The element grid of a number format, and how a scale follows from an amax.

    Attributes:
        max_value: Largest magnitude of the grid that a scale maps ``amax`` to.
        storage: Dtype that holds one code.
    """

    max_value: float
    storage: torch.dtype

    def scales(self, amax: Tensor) -> Scales:
        """Return the scales for an ``amax`` (float32, any shape)."""
        ...

    def round_(self, values: Tensor) -> Tensor:
        """Clamp to the range and round onto the grid, ties to even, in place (float32)."""
        ...

    def store(self, values: Tensor) -> Tensor:
        """Return grid values as codes of ``storage``."""
        ...

    def load(self, codes: Tensor) -> Tensor:
        """Return codes as float32 grid values."""
        ...


def _linear_scale(amax: Tensor, max_value: float) -> Tensor:
    """``amax / max_value``; 1 where amax is 0, so that codes and results are 0 there."""
    amax = amax.float()
    scale = (amax / max_value).clamp_min(SMALLEST)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


@dataclass(frozen=True)
class IntCodec:
    """Integers ``[-2^(b-1), 2^(b-1)-1]``, scale ``amax / (2^(b-1)-1)`` (design: numerics.md).

    Args:
        bits: Bits of a code, 2 to 8.
        narrow: Leave out the lowest code, so that the range is symmetric.
    """

    bits: int
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise NumericsError(f"integers have 2 to 8 bits, not {self.bits}")

    @property
    def max_value(self) -> float:
        """Largest code."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def min_value(self) -> float:
        """Smallest code."""
        return -self.max_value if self.narrow else -self.max_value - 1

    @property
    def storage(self) -> torch.dtype:
        """Codes are int8, one per element, whatever their bits."""
        return torch.int8

    def scales(self, amax: Tensor) -> Scales:
        """Return ``amax / max_value``."""
        return Scales(_linear_scale(amax, self.max_value))

    def round_(self, values: Tensor) -> Tensor:
        """Clamp and round to integers; adding 0 turns -0 into +0."""
        return values.clamp_(self.min_value, self.max_value).round_().add_(0.0)

    def store(self, values: Tensor) -> Tensor:
        """Return the integers as int8."""
        return values.to(torch.int8)

    def load(self, codes: Tensor) -> Tensor:
        """Return the integers as float32."""
        return codes.float()


@dataclass(frozen=True)
class FloatCodec:
    """A torch float8 grid, scale ``amax / max`` (OCP OFP8; subnormals kept, saturating).

    Args:
        dtype: Name of the torch dtype.
    """

    dtype: str = "float8_e4m3fn"

    @property
    def max_value(self) -> float:
        """Largest finite value: 448 for e4m3fn, 57344 for e5m2."""
        return float(torch.finfo(self.storage).max)

    @property
    def storage(self) -> torch.dtype:
        """The float8 dtype itself."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def scales(self, amax: Tensor) -> Scales:
        """Return ``amax / max_value``."""
        return Scales(_linear_scale(amax, self.max_value))

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


# A plain dict, since torch.compile looks into it, and ignores functools.lru_cache.
_CODECS: dict[tuple[str, tuple[tuple[str, object], ...]], Codec] = {}


def codec_of(number_format: NumberFormat, *, plugin: str = "bittern") -> Codec:
    """Return the codec of a format, made once per (factory, parameters).

    Args:
        number_format: The format.
        plugin: Label of the plugin that registered it, for errors.
    """
    key = (number_format.codec, tuple(sorted(number_format.params.items())))
    codec = _CODECS.get(key)
    if codec is None:
        make = bound(number_format.codec, plugin=plugin)
        codec = _CODECS[key] = make(**number_format.params)
    return codec
