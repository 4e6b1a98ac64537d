"""The KV cache in a checkpoint: one scale per attention for keys, one for values.

compressed-tensors says of the cache of the whole model that it is quantized, so every attention of
the model that has one must be, and nothing else of attention can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from compressed_tensors.utils.helpers import get_head_dim, get_num_attn_heads, get_num_kv_heads
from torch import Tensor, nn

from bittern.errors import ExportError
from bittern.exporting.packed import PackedModule
from bittern.nn import original_class
from bittern.numerics import FloatCodec, codec_of
from bittern.records import PerTensor, Plan, PlanEntry

__all__ = ["cache_scheme", "cache_tensors", "check_cache", "is_attention"]

HELD = ("k", "v")
LATENT = "kv_b_proj"  # the projection by which the client, too, tells latent attention
NO_CACHE = "leave it out (-o kv_cache=null), or --format safetensors"
FIX = "kv_cache: fp8 in the recipe quantizes what the file can hold; or --format safetensors"


def is_attention(slots: Mapping[str, PlanEntry]) -> bool:
    """Whether the slots of a module are those of attention."""
    return all(entry.like == "Attention" for entry in slots.values())


def check_cache(model: nn.Module, plan: Plan) -> None:
    """Refuse attention that compressed-tensors cannot hold.

    Raises:
        ExportError: Other slots than ``k`` and ``v``, another format than static fp8 per tensor, a
            cache of latents, not every attention with a cache, or a config that does not say the
            shape of one; with the first module that does not fit.
    """
    quantized = {p: slots for p, slots in plan.by_module().items() if is_attention(slots)}
    if not quantized:
        return
    for path, slots in quantized.items():
        others = sorted(set(slots) ^ set(HELD))
        if others:
            raise ExportError(
                f"compressed-tensors holds keys and values of attention, both and nothing else "
                f"(this is about {', '.join(others)})",
                where=path,
                hint=FIX,
            )
        for entry in slots.values():
            codec = codec_of(entry.spec.format)
            fp8 = isinstance(codec, FloatCodec) and codec.storage == torch.float8_e4m3fn
            if not fp8 or entry.spec.dynamic or not isinstance(entry.granularity, PerTensor):
                raise ExportError(
                    f"compressed-tensors has a KV cache in static fp8 per tensor, not {entry.spec}",
                    where=entry.path,
                    hint=FIX,
                )
        if hasattr(model.get_submodule(path), LATENT):
            raise ExportError(
                "the cache of this attention holds latents, from which keys and values are "
                "computed anew; what was quantized are the keys and values",
                where=path,
                hint=NO_CACHE,
            )
    cached = {path for path, module in model.named_modules() if _cached(module)}
    wrong = sorted(cached.symmetric_difference(quantized))
    if wrong:
        problem = "is not quantized" if wrong[0] in cached else "has no cache that the client knows"
        raise ExportError(
            f"compressed-tensors quantizes the KV cache of every attention, and this one {problem}",
            where=wrong[0],
            hint=NO_CACHE,
        )
    try:
        _check_heads(model.config)
    except ValueError as error:
        raise ExportError(
            "transformers does not load a quantized KV cache for this model: "
            f"{str(error).partition('. ')[0]}",
            hint=NO_CACHE,
        ) from error


def _check_heads(config: Any) -> None:
    """Raise the client's ValueError where it does not find the shapes of a cache in a config."""
    text = config.get_text_config(decoder=True)
    for read in (get_num_attn_heads, get_num_kv_heads, get_head_dim):
        read(text)


def cache_scheme(plan: Plan) -> QuantizationArgs | None:
    """Return the ``kv_cache_scheme`` of config.json, ``None`` where no cache is quantized."""
    if not any(is_attention(slots) for slots in plan.by_module().values()):
        return None
    return QuantizationArgs(
        num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False, observer=None
    )


def cache_tensors(item: PackedModule) -> dict[str, Tensor]:
    """Return the scales of an attention, float32 of shape ``(1,)``, under their names on disk."""
    return {f"{item.path}.{slot}_scale": item.inputs[slot].reshape(1) for slot in HELD}


def _cached(module: nn.Module) -> bool:
    """Whether the client quantizes the cache of a module, which it judges by its own class."""
    cls = original_class(module)
    seen = type(
        cls.__name__,
        (),
        {"forward": cls.forward, "__getattr__": lambda _, name: getattr(module, name)},
    )
    return bool(is_cached_attention_module(seen()))
