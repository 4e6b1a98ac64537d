"""Rules for the layers of Megatron-Core, as data."""

from __future__ import annotations

from typing import Any

from bittern.records import ModuleRule, Slot

__all__ = ["MODULE_RULES"]

LAYERS = "megatron.core.tensor_parallel.layers"

SLOTS = (
    Slot("weight", kind="weight", tensor="weight"),
    Slot("input", channel_axis=-1),
    Slot("output", channel_axis=-1),
)


def _has_its_weight(layer: Any) -> bool | str:
    """Whether the layer owns the weight that it multiplies with, and its gradient."""
    if layer.weight is None:
        return "it has no weight of its own, every call brings one (tied embeddings)"
    if getattr(layer, "grad_output_buffer", None) is not None:
        return "its weight gradient is computed later, from tensors that are not quantized"
    return True


MODULE_RULES: tuple[ModuleRule, ...] = (
    ModuleRule(
        target=f"{LAYERS}:ColumnParallelLinear",
        quantized="bittern_megatron.linear:QuantColumnParallelLinear",
        slots=SLOTS,
        predicate=_has_its_weight,
        like="Linear",
    ),
    ModuleRule(
        target=f"{LAYERS}:RowParallelLinear",
        quantized="bittern_megatron.linear:QuantRowParallelLinear",
        slots=SLOTS,
        like="Linear",
    ),
    ModuleRule(
        target=f"{LAYERS}:VocabParallelEmbedding",
        quantized=None,
        reason="rows of a VocabParallelEmbedding are looked up, never multiplied",
    ),
)
