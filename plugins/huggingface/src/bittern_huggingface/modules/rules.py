"""Rules for the classes of transformers that only their names tell, as data."""

from __future__ import annotations

from bittern.records import ModuleRule, Slot

__all__ = ["MODULE_RULES"]

PACKAGE = "bittern_huggingface.modules"
MODELS = "transformers.models"

MODULE_RULES: tuple[ModuleRule, ...] = (
    ModuleRule(
        target="transformers.pytorch_utils:Conv1D",
        quantized=f"{PACKAGE}.conv1d:QuantConv1D",
        slots=(
            Slot("weight", kind="weight", tensor="weight", channel_axis=1, group_axis=0),
            Slot("input", channel_axis=-1),
            Slot("output", channel_axis=-1),
        ),
        like="Linear",
    ),
    ModuleRule(
        target=f"{MODELS}.llama4.modeling_llama4:Llama4TextExperts",
        quantized=f"{PACKAGE}.experts:QuantBatchedExperts",
        slots_from=f"{PACKAGE}.experts:batched_slots",
        like="Linear",
    ),
    ModuleRule(
        target=f"{MODELS}.step3p7.modeling_step3p7:Step3p7Experts",
        quantized=f"{PACKAGE}.experts:QuantExperts",
        slots_from=f"{PACKAGE}.experts:expert_slots",
        like="Linear",
    ),
)
