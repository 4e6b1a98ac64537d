"""Number formats and quantizer specs, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bittern.records.checks import check_import_strings
from bittern.records.granularity import Granularity, PerTensor

__all__ = ["NumberFormat", "QuantizerSpec"]

PER_TENSOR = PerTensor()


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A number format that recipes can name.

    Attributes:
        name: The name in recipes, for example ``"int8"``.
        bits: Bits of one element code.
        codec: ``"package.module:factory"``; called with ``**params`` it returns an object with the
            methods of `bittern.numerics.codec.Codec`. Resolved on first use.
        params: Keyword arguments of the factory.
        kind: ``"int"`` or ``"float"``; what exporters write as the element type.
        scale_bits: Bits of one stored scale.
        weight_granularity: Granularity of weights where a recipe does not say.
        input_granularity: Granularity of activations where a recipe does not say.
        description: One line for ``bittern recipes`` and the docs.
    """

    name: str
    bits: int
    codec: str
    params: Mapping[str, object] = field(default_factory=dict)
    kind: str = "int"
    scale_bits: int = 32
    weight_granularity: Granularity = PER_TENSOR
    input_granularity: Granularity = PER_TENSOR
    description: str = ""

    def __post_init__(self) -> None:
        check_import_strings(self, "codec")


@dataclass(frozen=True)
class QuantizerSpec:
    """How one tensor is quantized.

    Attributes:
        format: The number format.
        granularity: Which elements share a scale.
        dynamic: Whether the scale is computed from each tensor anew; static quantizers are
            calibrated once.
    """

    format: NumberFormat
    granularity: Granularity
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.format.name}/{self.granularity}" + ("/dynamic" if self.dynamic else "")

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Return stored bits per element of a tensor of ``shape``, its scales included."""
        from bittern.records.granularity import PerBlock, PerChannel, PerGroup, PerToken

        numel = 1
        for size in shape:
            numel *= size
        if numel == 0:
            return float(self.format.bits)
        match self.granularity:
            case PerChannel(axis=axis):
                scales = shape[axis]
            case PerToken():
                scales = numel // shape[-1]
            case PerGroup(size=size):
                scales = numel // shape[-1] * -(-shape[-1] // size)
            case PerBlock(rows=rows, cols=cols):
                scales = numel // (shape[-1] * shape[-2])
                scales *= -(-shape[-2] // rows) * -(-shape[-1] // cols)
            case _:
                scales = 1
        return self.format.bits + self.format.scale_bits * scales / numel
