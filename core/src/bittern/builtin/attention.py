"""Core's rules for attention layers, as data; and what a live model adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bittern.records import ATTENTION_SLOTS, ModuleRule, Slot

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ATTENTION_RULES", "projections_read_elsewhere"]

OUT_PROJ = "torch.nn.modules.linear:NonDynamicallyQuantizableLinear"

ATTENTION_RULES: tuple[ModuleRule, ...] = (
    ModuleRule(
        target="torch.nn.modules.activation:MultiheadAttention",
        quantized="bittern.nn.multihead:QuantMultiheadAttention",
        slots_from="bittern.nn.multihead:multihead_slots",
        like="Linear",
    ),
    ModuleRule(
        target="bittern.nn.functional:ScaledDotProductAttention",
        quantized="bittern.nn.attention:QuantAttention",
        slots=ATTENTION_SLOTS,
        like="Attention",
        by_name=True,
    ),
    ModuleRule(
        target="bittern.nn.functional:MatMul",
        quantized="bittern.nn.functional:QuantMatMul",
        slots=(
            Slot("left", channel_axis=-1, role="input"),
            Slot("right", channel_axis=-1, role="input"),
            Slot("output", channel_axis=-1),
        ),
        by_name=True,
    ),
)


def projections_read_elsewhere(model: nn.Module) -> list[ModuleRule]:
    """Return the rule that refuses output projections whose attention may not call them.

    `nn.MultiheadAttention` reads the weight of its ``out_proj``. Where its forward is its own, the
    quantized class calls it instead; what the forward of a subclass does is not known.

    Args:
        model: The model; converted modules count as what they were.
    """
    from torch import nn

    from bittern.nn import original_class

    plain = nn.MultiheadAttention
    called = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, plain) and original_class(module).forward is plain.forward
    }
    return [
        ModuleRule(
            target=OUT_PROJ,
            quantized=None,
            reason="it is the output projection of an attention with a forward of its own, which "
            "may read the weight without calling the layer, as that of nn.MultiheadAttention does",
            predicate=lambda module: id(module) not in called,
            priority=1,
        )
    ]
