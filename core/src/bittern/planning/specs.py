"""From what a recipe says about a slot to a complete QuantizerSpec."""

from __future__ import annotations

from bittern.config import SpecModel
from bittern.errors import RecipeError
from bittern.numerics.codec import codec_of
from bittern.records import (
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Slot,
)
from bittern.registry import NamedTable

__all__ = ["resolve_spec"]


def resolve_spec(
    said: SpecModel, slot: Slot, formats: NamedTable[NumberFormat], *, where: str
) -> QuantizerSpec:
    """Fill in the defaults of a recipe's spec for one slot.

    Args:
        said: What the recipe says.
        slot: The slot of the module rule.
        formats: Known formats.
        where: The recipe rule, for errors.

    Raises:
        RecipeError: Unknown format, or an impossible combination.
        PluginError: The format's codec cannot be made.
    """
    number_format = formats.get(said.format)
    codec_of(number_format, plugin=formats.plugin(said.format))  # fails now, by the plugin's name
    weight = slot.kind == "weight"
    granularity = _granularity(said, slot, number_format, where)
    fine = isinstance(granularity, PerToken | PerGroup | PerBlock)
    dynamic = said.dynamic if said.dynamic is not None else fine and not weight
    if weight and dynamic:
        raise RecipeError(
            f"the slot {slot.name!r} is a weight, and weights are static",
            where=where,
            hint="leave out dynamic: true",
        )
    if weight and isinstance(granularity, PerToken):
        raise RecipeError("a weight has no tokens", where=where, hint="use granularity: channel")
    if not weight and fine and not dynamic:
        raise RecipeError(
            f"static scales per {granularity} would fix the shape of activations",
            where=where,
            hint="leave out dynamic: false, or use granularity: tensor",
        )
    return QuantizerSpec(number_format, granularity, dynamic)


def _granularity(
    said: SpecModel, slot: Slot, number_format: NumberFormat, where: str
) -> Granularity:
    default = (
        number_format.weight_granularity
        if slot.kind == "weight"
        else number_format.input_granularity
    )
    name = said.granularity
    if name is None and said.size is not None:
        name = "group"
    if name is None and said.rows is not None:
        name = "block"
    match name:
        case None:
            found: Granularity = default
        case "tensor":
            found = PerTensor()
        case "token":
            found = PerToken()
        case "channel":
            return PerChannel(said.axis if said.axis is not None else slot.channel_axis)
        case "group":
            size = said.size
            if size is None and isinstance(default, PerGroup):
                size = default.size
            if size is None:
                raise RecipeError(
                    "granularity: group needs a size", where=where, hint="write size: 128"
                )
            return PerGroup(size)
        case "block":
            assert said.rows is not None
            assert said.cols is not None
            return PerBlock(said.rows, said.cols)
    return PerChannel(slot.channel_axis) if isinstance(found, PerChannel) else found
