"""From what a recipe says about a slot to a complete QuantizerSpec."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from bittern.config import SpecModel
from bittern.errors import NumericsError, RecipeError
from bittern.numerics.codec import codec_of
from bittern.records import (
    Affine,
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Rotation,
    Slot,
)
from bittern.registry import NamedTable

__all__ = ["resolve_spec", "with_options"]


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
    number_format = _format(said, formats, where)
    codec = codec_of(number_format, plugin=formats.plugin(said.format))
    weight = slot.kind == "weight"
    granularity = _granularity(said, slot, number_format, where)
    fine = isinstance(granularity, PerToken | PerGroup | PerBlock)
    blocks = isinstance(granularity, PerGroup | PerBlock)
    upper = codec.two_level and blocks and not weight  # the global scale may be static
    given = said.amax is not None
    free = fine and not weight and not upper and not given
    dynamic = said.dynamic if said.dynamic is not None else free

    def refuse(problem: str, hint: str) -> RecipeError:
        return RecipeError(f"slot {slot.name!r}: {problem}", where=where, hint=hint)

    if number_format.block_only and not blocks:
        raise refuse(
            f"{said.format} has scales per group or block, not per {granularity}",
            f"leave out granularity: it is {number_format.weight_granularity}",
        )
    if codec.two_level and not blocks:
        raise refuse(
            f"{said.format} has block scales under a global one, not per {granularity}",
            f"leave out granularity: it is {number_format.weight_granularity}",
        )
    if weight and dynamic:
        raise refuse("it is a weight, and weights are static", "leave out dynamic: true")
    if weight and isinstance(granularity, PerToken):
        raise refuse("a weight has no tokens", "use granularity: channel")
    if fine and not weight and not dynamic and not upper:
        raise refuse(
            f"static scales per {granularity} would fix the shape of activations",
            "leave out dynamic: false and amax, or use granularity: tensor",
        )
    if given and (codec.asymmetric or not (upper or isinstance(granularity, PerTensor))):
        raise refuse(
            "a given amax is one range for a whole tensor, in a symmetric format",
            "leave out amax, or use granularity: tensor",
        )
    if slot.stacked and not weight and not dynamic and isinstance(granularity, PerChannel):
        raise refuse(
            "its static ranges are one per expert, not per channel",
            "use granularity: tensor, or dynamic scales",
        )
    affine = said.affine
    then = None
    if said.then is not None:
        then = resolve_spec(said.then, slot, formats, where=where)
    return QuantizerSpec(
        format=number_format,
        granularity=_per_expert(granularity) if slot.stacked and weight else granularity,
        dynamic=dynamic,
        stacked=slot.stacked,
        backend=said.backend,
        constant_amax=said.amax,
        rotation=None if said.rotate is None else Rotation(**said.rotate.model_dump()),
        affine=None
        if affine is None
        else Affine(axes=tuple(affine.axes), method=affine.method, dynamic=affine.dynamic),
        then=then,
    )


def with_options(number_format: NumberFormat, options: Mapping[str, object]) -> NumberFormat:
    """Return a format with some of its codec's parameters changed.

    Raises:
        NumericsError: The codec does not take them.
    """
    if not options:
        return number_format
    # a list of YAML is a tuple, as codecs take it: those of equal parameters are one
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    changed = dataclasses.replace(
        number_format,
        params={**number_format.params, **options},
        options={**number_format.options, **options},
    )
    try:
        codec = codec_of(changed)
    except (TypeError, ValueError) as error:
        raise NumericsError(
            f"{number_format.name} does not take the options {dict(options)}: {error}",
            hint="see the table of formats for the options there are",
        ) from error
    if codec.asymmetric and not changed.zero_point_bits:
        changed = dataclasses.replace(changed, zero_point_bits=changed.bits)
    return changed


def _format(said: SpecModel, formats: NamedTable[NumberFormat], where: str) -> NumberFormat:
    number_format = formats.get(said.format)
    codec_of(number_format, plugin=formats.plugin(said.format))  # fails now, by the plugin's name
    fixed = sorted({"bits", "dtype"} & set(said.options))
    if fixed:
        raise RecipeError(
            f"{fixed[0]} is what makes a format {said.format}",
            where=where,
            hint="name another format",
        )
    try:
        return with_options(number_format, said.options)
    except NumericsError as error:
        raise RecipeError(error.what, where=where, hint=error.hint) from error


def _per_expert(granularity: Granularity) -> Granularity:
    """Return the granularity of stacked weights, where every one has scales of its own."""
    match granularity:
        case PerTensor():
            return PerChannel(0)
        case PerChannel(axes=axes):
            return PerChannel((0, *(axis for axis in axes if axis != 0)))
        case _:
            return granularity


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
            axis = tuple(said.axis) if isinstance(said.axis, list) else said.axis
            return PerChannel(axis if axis is not None else slot.channel_axis)
        case "group":
            size = said.size
            if size is None and isinstance(default, PerGroup):
                size = default.size
            if size is None:
                raise RecipeError(
                    "granularity: group needs a size", where=where, hint="write size: 128"
                )
            return PerGroup(size, said.axis if isinstance(said.axis, int) else slot.group_axis)
        case "block":
            assert said.rows is not None
            assert said.cols is not None
            return PerBlock(said.rows, said.cols)
    if isinstance(found, PerGroup):
        return PerGroup(found.size, slot.group_axis)
    return PerChannel(slot.channel_axis) if isinstance(found, PerChannel) else found
