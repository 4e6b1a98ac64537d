"""Number formats and quantizer specs, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bittern.records.checks import check_import_strings
from bittern.records.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
)

__all__ = ["Affine", "NumberFormat", "QuantizerSpec", "Rotation"]

PER_TENSOR = PerTensor()


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A number format that recipes can name.

    Attributes:
        name: The name in recipes, for example ``"int8"``.
        bits: Bits of one element code.
        codec: ``"package.module:factory"``; called with ``**params`` it returns a
            `bittern.numerics.Codec`. Resolved on first use.
        params: Keyword arguments of the factory.
        kind: ``"int"``, ``"float"`` or ``"codebook"``; what exporters write as the element type.
        scale_bits: Bits of one stored scale.
        zero_point_bits: Bits of one stored zero point, beside every scale.
        tensor_bits: Bits stored once per tensor, as the global scale of nvfp4.
        options: What a recipe changed of ``params``.
        block_only: Whether its scales are per group or block, and nothing coarser.
        weight_granularity: Granularity of weights where a recipe does not say.
        input_granularity: Granularity of activations where a recipe does not say.
        description: One line for ``bittern recipes`` and the docs.
    """

    name: str
    bits: int
    codec: str
    params: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    kind: str = "int"
    scale_bits: int = 32
    zero_point_bits: int = 0
    tensor_bits: int = 0
    block_only: bool = False
    weight_granularity: Granularity = PER_TENSOR
    input_granularity: Granularity = PER_TENSOR
    description: str = ""

    def __post_init__(self) -> None:
        check_import_strings(self, "codec")
        if not isinstance(self.bits, int) or self.bits < 1:
            raise ValueError(f"NumberFormat.bits is {self.bits!r}; write how many bits a code has")
        for name in ("weight_granularity", "input_granularity"):
            value = getattr(self, name)
            if not isinstance(value, Granularity):
                raise TypeError(f"NumberFormat.{name} must be as PerChannel(0), not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """A rotation of the last axis before quantization.

    Attributes:
        kind: ``"hadamard"``: the Walsh-Hadamard matrix over ``sqrt(block)``; ``"given"``: the
            matrix that `TensorQuantizer.set_rotation` is handed.
        block: Size of the blocks of the last axis that are rotated, a power of two for Hadamard;
            ``None``: the largest power of two that divides the axis.
        back: Rotate back after quantization, so that the result is an estimate of the input.
    """

    kind: str = "hadamard"
    block: int | None = None
    back: bool = False

    def __str__(self) -> str:
        size = "" if self.block is None else f"[{self.block}]"
        return f"{self.kind}{size}" + ("+back" if self.back else "")


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A bias that is subtracted before quantization and added after it.

    Attributes:
        axes: The axes along which the bias varies; the others are reduced and stay as 1.
        method: ``"mean"``: the mean of the data; ``"mid"``: half of its maximum plus minimum.
        dynamic: Whether the bias is computed from each tensor anew.
    """

    axes: tuple[int, ...] = (-1,)
    method: str = "mean"
    dynamic: bool = False

    def __str__(self) -> str:
        axes = ",".join(map(str, self.axes))
        return f"{self.method}[{axes}]" + ("/dynamic" if self.dynamic else "")


@dataclass(frozen=True)
class QuantizerSpec:
    """How one tensor is quantized.

    Attributes:
        format: The number format.
        granularity: Which elements share a scale.
        dynamic: Whether the scale is computed from each tensor anew; static quantizers are
            calibrated once. A static activation in a format with a global scale (nvfp4) has that
            one calibrated; its block scales follow from each tensor.
        stacked: Whether the first axis stacks independent tensors (experts), which share nothing.
        backend: Name of the implementation to use; ``None`` takes the fastest exact one.
        constant_amax: A range that is given instead of calibrated.
        rotation: A rotation before quantization.
        affine: A bias around quantization.
        then: What quantizes the result again: int4 weights that are held in fp8 (W4A8).
    """

    format: NumberFormat
    granularity: Granularity
    dynamic: bool = False
    stacked: bool = False
    backend: str | None = None
    constant_amax: float | None = None
    rotation: Rotation | None = None
    affine: Affine | None = None
    then: QuantizerSpec | None = None

    def __str__(self) -> str:
        changed = ",".join(f"{name}={value}" for name, value in self.format.options.items())
        name = f"{self.format.name}({changed})" if changed else self.format.name
        parts = [f"{name}/{self.granularity}" + ("/dynamic" if self.dynamic else "")]
        parts += [f"amax {self.constant_amax:g}"] if self.constant_amax is not None else []
        parts += [f"rotated {self.rotation}"] if self.rotation is not None else []
        parts += [f"affine {self.affine}"] if self.affine is not None else []
        parts += [f"by {self.backend}"] if self.backend is not None else []
        text = ", ".join(parts)
        return text if self.then is None else f"{text} > {self.then}"

    @property
    def needs_data(self) -> bool:
        """Whether an activation so quantized has to see data first: a range or bias, all along."""
        biased = self.affine is not None and not self.affine.dynamic
        ranged = not self.dynamic and self.constant_amax is None
        return ranged or biased or (self.then is not None and self.then.needs_data)

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Return stored bits per element of a tensor of ``shape``, scales and bias included.

        A second quantization (``then``) stores one further scale per tensor and no codes.
        """
        numel = math.prod(shape)
        if numel == 0:
            return float(self.format.bits)
        match self.granularity:
            case PerChannel(axes=axes):
                scales = _along(shape, axes)
            case PerToken():
                scales = numel // shape[-1]
            case PerGroup(size=size, axis=axis):
                scales = numel // shape[axis] * -(-shape[axis] // size)
            case PerBlock(rows=rows, cols=cols):
                scales = numel // (shape[-1] * shape[-2])
                scales *= -(-shape[-2] // rows) * -(-shape[-1] // cols)
            case _:
                scales = 1
        tensors = shape[0] if self.stacked else 1
        extra = (self.format.scale_bits + self.format.zero_point_bits) * scales
        extra += self.format.tensor_bits * tensors
        extra += 0 if self.affine is None else 32 * _along(shape, self.affine.axes)
        extra += 0 if self.then is None else self.then.format.scale_bits * tensors
        return self.format.bits + extra / numel


def _along(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Return how many elements the axes have, each counted once."""
    return math.prod(shape[axis] for axis in {axis % len(shape) for axis in axes})
