"""NVFP4: blocks of e2m1 numbers under an e4m3 scale, under one float32 scale of the tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.numerics.codec import LARGEST, Scales, linear_scale, quotient
from bittern.numerics.floats import GridCodec
from bittern.numerics.grids import E2M1, E4M3, FloatGrid

__all__ = ["NVFP4Codec"]

SMALLEST_BLOCK_SCALE = 2.0**-9  # of e4m3; a block is never scaled by 0


@dataclass(frozen=True)
class NVFP4Codec(GridCodec):
    """Global scale ``g = amax / (6 * 448)``, of a block ``b = e4m3(amax_b / (6 * g))``.

    ``b`` is clamped to ``[2^-9, 448]``, and one step of a code is worth ``b * g``. The format of
    "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149).

    Args:
        four_over_six: Choose per block between mapping its largest magnitude to 6 and to 4
            ("Four Over Six", arXiv 2512.02010), by the squared error. Then ``g`` is
            ``amax / (6 * 256)``, so that the scale for 4, larger by half, fits into e4m3.
    """

    four_over_six: bool = False

    two_level = True
    overshoots = True

    @property
    def grid(self) -> FloatGrid:
        """e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
        return E2M1

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """Whether a block chooses between two scales."""
        return self.four_over_six

    def global_scale(self, amax: Tensor) -> Tensor:
        """Return ``g`` for the ``amax`` of a whole tensor; 1 for 0."""
        return linear_scale(amax, 6.0 * (256.0 if self.four_over_six else 448.0))

    def scales(self, amax: Tensor, global_scale: Tensor | None = None) -> Scales:
        """Return block scales, exact e4m3 numbers from 2^-9 to 448; 1 where ``amax`` is 0."""
        return Scales(_block_scale(amax, 6.0, global_scale), global_scale=global_scale)

    def other_scale(self, amax: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """Return block scales that map ``amax`` to 4."""
        return _block_scale(amax, 4.0, global_scale)


def _block_scale(amax: Tensor, largest: float, global_scale: Tensor | None) -> Tensor:
    amax = amax.float()
    ratio = quotient(amax, largest) if global_scale is None else amax / (largest * global_scale)
    scale = E4M3.round_(ratio.clamp_(SMALLEST_BLOCK_SCALE, E4M3.max_value))
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return torch.where(amax <= LARGEST, scale, amax)  # NaN and Inf stay
