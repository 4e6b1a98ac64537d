"""The quantizer positions of attention."""

from __future__ import annotations

from bittern.records.modules import Slot

__all__ = ["ATTENTION_SLOTS"]

# The operands of the two products and the output, as `bittern.nn.attention.QuantAttention` and
# `bittern.nn.multihead.QuantMultiheadAttention` have them. No role: a recipe that says "input" is
# about linear layers.
ATTENTION_SLOTS: tuple[Slot, ...] = (
    Slot("q", channel_axis=-1),
    Slot("k", channel_axis=-1),
    Slot("v", channel_axis=-1),
    Slot("p", channel_axis=-1),
    Slot("output", channel_axis=-1),
)
