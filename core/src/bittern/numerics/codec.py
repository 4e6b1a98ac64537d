"""Codecs: the element grids of the number formats and their scales.

A codec is pure: tensors in, tensors out, all arithmetic in float32. `quantize`, `dequantize` and
`fake_quantize` (quantize.py) are written on top of it once for all formats. This file holds what a
codec is; the grids themselves are in integers.py, floats.py and their neighbors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import PluginError
from bittern.records import NumberFormat
from bittern.registry.targets import bound

__all__ = ["LARGEST", "SMALLEST", "Codec", "Scales", "codec_of", "linear_scale", "quotient"]

# Smallest positive float32; a scale that underflows is clamped to it, never 0 (numerics.md).
SMALLEST = 2.0**-149
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Scales:
    """The scales of one tensor, float32, in the shape its granularity gives.

    Attributes:
        scale: What one code step is worth; in a format of two levels, in units of the global scale.
        zero_point: The code of 0 in an asymmetric format, an integer; the shape of ``scale``.
        global_scale: The upper of two levels: ``()``, or ``(n, 1, ..)`` for ``n`` stacked tensors.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """What one code step is worth: the product of both levels, never 0."""
        if self.global_scale is None:
            return self.scale
        return (self.scale * self.global_scale).clamp_min(SMALLEST)


class Codec(ABC):
    """The element grid of a number format, and how a scale follows from a range.

    Attributes:
        max_value: Largest magnitude of the grid that a scale maps ``amax`` to.
        storage: Dtype that holds one code.
        signed: Whether the grid holds negative values.
        asymmetric: Whether scales follow from both ends of a range (`scales_between`).
        two_level: Whether block scales stand under one global scale (`global_scale`).
        fitted: Whether a block has a second scale to choose from (`other_scale`); the one with the
            smaller squared error wins, the first on a tie.
        overshoots: Whether a number may be rounded to more than the largest one of its block; what
            is then too large for its dtype saturates there, instead of becoming Inf.
    """

    max_value: float
    storage: torch.dtype
    signed: bool = True
    asymmetric: bool = False
    two_level: bool = False
    fitted: bool = False
    overshoots: bool = False

    @property
    def min_value(self) -> float:
        """Smallest value of the grid."""
        return -self.max_value if self.signed else 0.0

    @abstractmethod
    def scales(self, amax: Tensor, global_scale: Tensor | None = None) -> Scales:
        """Return the scales for an ``amax`` (float32, any shape); 1 where it is 0.

        Args:
            amax: Largest magnitudes.
            global_scale: In a format of two levels, the upper one; it broadcasts against ``amax``.
        """

    @abstractmethod
    def round_(self, values: Tensor) -> Tensor:
        """Clamp to the range and round onto the grid, ties to even, in place (float32).

        NaN stays NaN, and no result is -0.
        """

    @abstractmethod
    def store(self, values: Tensor) -> Tensor:
        """Return grid values as codes of ``storage``."""

    @abstractmethod
    def load(self, codes: Tensor) -> Tensor:
        """Return codes as float32 grid values."""

    def scales_between(self, low: Tensor, high: Tensor) -> Scales:
        """Return the scales for a range ``low <= 0 <= high``, of an asymmetric format."""
        raise NotImplementedError

    def global_scale(self, amax: Tensor) -> Tensor:
        """Return the global scale for the ``amax`` of a whole tensor, of a format of two levels."""
        raise NotImplementedError

    def other_scale(self, amax: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """Return the second scale for an ``amax``, of a fitted format."""
        raise NotImplementedError


def quotient(values: Tensor, divisor: float) -> Tensor:
    """Return ``values / divisor``, rounded once on every device.

    By a Python number, or a scalar on the CPU, CUDA multiplies with the reciprocal, which is
    rounded before.
    """
    return values / torch.full((), divisor, dtype=values.dtype, device=values.device)


def linear_scale(amax: Tensor, max_value: float) -> Tensor:
    """``amax / max_value``, such that ``max_value`` decodes to a finite number; 1 where amax is 0.

    A NaN or infinite ``amax`` stays one.
    """
    amax = amax.float()
    scale = quotient(amax, max_value).clamp_min(SMALLEST)
    # float32(amax / max) may be rounded up, so that max times it would be Inf for the largest amax
    mantissa, exponent = math.frexp(min(LARGEST / max_value, LARGEST))
    limit = math.ldexp(math.floor(math.ldexp(mantissa, 24)), exponent - 24)  # a float32, cut off
    scale = torch.where(amax <= LARGEST, scale.clamp_max(limit), scale)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


# A plain dict, since torch.compile looks into it, and ignores functools.lru_cache.
_CODECS: dict[tuple[str, tuple[tuple[str, object], ...]], Codec] = {}


def codec_of(number_format: NumberFormat, *, plugin: str = "bittern") -> Codec:
    """Return the codec of a format, made once per (factory, parameters).

    Args:
        number_format: The format.
        plugin: Label of the plugin that registered it, for errors.

    Raises:
        PluginError: The factory does not resolve, or makes no `Codec`.
    """
    key = (number_format.codec, tuple(number_format.params.items()))
    codec = _CODECS.get(key)
    if codec is None:
        made = bound(number_format.codec, plugin=plugin)(**number_format.params)
        if not isinstance(made, Codec):
            raise PluginError(
                f"plugin {plugin}: {number_format.codec} of the format {number_format.name} makes "
                f"a {type(made).__name__}",
                hint="derive the codec from bittern.numerics.Codec",
            )
        codec = _CODECS[key] = made
    return codec
