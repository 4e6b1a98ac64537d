"""The quantizer positions of attention."""

from __future__ import annotations

from bittern.records.modules import Slot

__all__ = ["ATTENTION_SLOTS"]

#: The operands of the two products, ``q k v p``, and the output, as
#: `bittern.nn.attention.QuantAttention` has them. A recipe speaks of them by name.
ATTENTION_SLOTS: tuple[Slot, ...] = (
    Slot("q", channel_axis=-1),
    Slot("k", channel_axis=-1),
    Slot("v", channel_axis=-1),
    Slot("p", channel_axis=-1),
    Slot("output", channel_axis=-1),
)
