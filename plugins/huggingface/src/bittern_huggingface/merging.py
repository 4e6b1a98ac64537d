"""Adapters of peft on a quantized model: merging them into weights that are quantized."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from bittern.errors import PlanError
from bittern.nn import QuantModule, named_quantizers
from bittern.nn.packed import PackedWeight
from bittern.training import train_ranges

__all__ = ["merge_adapters"]


def merge_adapters(model: PeftModel, **options: Any) -> nn.Module:
    """Add trained adapters to the weights of a quantized model, and quantize these anew.

    The ranges of the weights become those of the sums, clipped as calibration clipped them;
    activations keep theirs. Beside its adapters a model computed ``Q(W) x + B A x``; merged, it
    computes ``Q(W + B A) x``, so its outputs change by the rounding of what was added.

    ``merge_and_unload`` of peft leaves ranges as they were, and writes where no quantizer sees it:
    weights that are frozen would go on being quantized as they were.

    Args:
        model: What ``peft.get_peft_model`` made of a quantized model.
        options: As ``merge_and_unload`` takes them: ``safe_merge``, ``adapter_names``.

    Returns:
        The model without adapters, quantized, with its stack of modes.

    Raises:
        PlanError: Weights are packed or folded, so that there is nothing to add to.
    """
    for name, quantizer in named_quantizers(model):
        if quantizer.folded:
            raise PlanError(
                "the weight is folded: adding to it would leave the sum unquantized",
                where=name,
                hint="call bittern.unfold(model) first",
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, PackedWeight):
            raise PlanError(
                "the weight is packed, and adapters cannot be added to codes",
                where=name,
                hint="keep the adapters beside it, or bittern.revert the model and quantize what "
                "merge_and_unload gives",
            )
    ranges = train_ranges(model, weights="follow", activations="fixed")
    changed = _quantized_below_adapters(model)
    merged: nn.Module = model.merge_and_unload(**options)
    frozen = [p for m in changed for p in m.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:  # those of frozen weights stay as they are
            parameter.requires_grad_(True)
        ranges.finish()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    for _, quantizer in named_quantizers(merged):
        quantizer.clear_cache()
    return merged


def _quantized_below_adapters(model: nn.Module) -> list[QuantModule]:
    """Return the quantized modules that adapters were put around."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return [layer for layer in layers if isinstance(layer, QuantModule)]
