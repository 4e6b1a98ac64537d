"""Granularity: which elements of a tensor share one scale.

The names follow the field (torchao's ``granularity.py``, compressed-tensors' strategies). Shapes
below are those of ``amax`` and of the scale for an input of shape ``(..., n)``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Granularity", "PerBlock", "PerChannel", "PerGroup", "PerTensor", "PerToken"]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: shape ``()``."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of ``axis``; the other dimensions stay as 1: ``(out, 1)`` for axis 0.

    Several axes keep them all: ``(0, 1)`` of stacked weights ``(experts, out, in)`` gives
    ``(experts, out, 1)``.
    """

    axis: int | tuple[int, ...] = 0

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that keep their size."""
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    def __str__(self) -> str:
        return "channel" if self.axis == 0 else f"channel[{','.join(map(str, self.axes))}]"


@dataclass(frozen=True)
class PerToken:
    """One scale per row along the last axis: shape ``(..., 1)``."""

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerGroup:
    """One scale per ``size`` consecutive elements of ``axis``: ``(..., ceil(n / size))``.

    Another axis than the last one is for weights stored input features first, ``(in, out)``.
    """

    size: int
    axis: int = -1

    def __str__(self) -> str:
        return f"group[{self.size}]" if self.axis == -1 else f"group[{self.size}, axis {self.axis}]"


@dataclass(frozen=True)
class PerBlock:
    """One scale per ``rows`` x ``cols`` tile of the last two axes."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"block[{self.rows}x{self.cols}]"


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock
