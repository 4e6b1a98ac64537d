"""Core's rules for the layers of torch.nn, as data; those for attention are in `attention`."""

from __future__ import annotations

from bittern.records import ModuleRule, Slot

__all__ = ["INPUT", "MODULE_RULES", "OUTPUT", "WEIGHT"]

INPUT = Slot("input", channel_axis=-1)
OUTPUT = Slot("output", channel_axis=-1)
WEIGHT = Slot("weight", kind="weight", tensor="weight", channel_axis=0)

MODULE_RULES: tuple[ModuleRule, ...] = (
    ModuleRule(
        target="torch.nn.modules.linear:Linear",
        quantized="bittern.nn.linear:QuantLinear",
        slots=(WEIGHT, INPUT, OUTPUT),
    ),
    ModuleRule(
        target="torch.nn.modules.linear:NonDynamicallyQuantizableLinear",
        quantized=None,
        reason="nn.MultiheadAttention reads its weight without calling it",
    ),
    ModuleRule(
        target="torch.nn.modules.sparse:Embedding",
        quantized="bittern.nn.linear:QuantEmbedding",
        slots=(WEIGHT, OUTPUT),
    ),
    *(
        ModuleRule(
            target=f"torch.nn.modules.conv:Conv{n}d",
            quantized=f"bittern.nn.conv:QuantConv{n}d",
            slots=(WEIGHT, Slot("input", channel_axis=1), Slot("output", channel_axis=1)),
        )
        for n in (1, 2, 3)
    ),
)
