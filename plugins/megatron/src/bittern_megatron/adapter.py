"""What only Megatron-Core knows about its models, read from their structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import get_pg_size
from torch import Tensor, nn

from bittern.nn import original_class
from bittern.records import ModelAdapter

__all__ = ["make_adapter", "unwrapped"]

EMBEDDINGS = (VocabParallelEmbedding, LanguageModelEmbedding, nn.Embedding)


def unwrapped(model: nn.Module) -> tuple[MegatronModule | None, str]:
    """Return Megatron's model below wrappers such as Float16Module, and the prefix of its names."""
    prefix = ""
    while isinstance(getattr(model, "module", None), nn.Module):
        model, prefix = model.module, f"{prefix}module."
    return (model if isinstance(model, MegatronModule) else None), prefix


def make_adapter(model: nn.Module) -> ModelAdapter | None:
    """Describe a model of Megatron-Core; ``None`` for anything else."""
    inner, prefix = unwrapped(model)
    if inner is None:
        return None
    is_gpt = isinstance(inner, GPTModel)
    vocab = getattr(inner, "vocab_size", None)
    return ModelAdapter(
        blocks=_blocks(model),
        roles=_roles(inner, prefix),
        causal=True if is_gpt else None,
        vocab_size=vocab if isinstance(vocab, int) else None,
        example_inputs=(lambda: _example(inner)) if is_gpt else None,
        logits=(lambda output: _logits(inner, output)) if is_gpt else None,
    )


def _blocks(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{path}.layers.{i}"
        for path, block in model.named_modules()
        if isinstance(block, TransformerBlock)
        for i in range(len(block.layers))
    )


def _roles(inner: nn.Module, prefix: str) -> Mapping[str, str]:
    head = inner.output_layer if isinstance(inner, LanguageModule) and _has_head(inner) else None
    roles: dict[str, str] = {}
    for path, module in inner.named_modules():
        if module is head:
            role = "head"
        elif isinstance(module, EMBEDDINGS):
            role = "embedding"
        elif isinstance(module, Router):
            role = "router"
        elif original_class(module).__name__.endswith("Norm"):
            role = "norm"
        else:
            continue
        roles[prefix + path] = role
    return roles


def _has_head(inner: nn.Module) -> bool:
    return isinstance(getattr(inner, "output_layer", None), nn.Module)


def _example(model: Any) -> Mapping[str, Any]:
    """Return a row of 16 tokens, each of which may see those before it."""
    length = min(16, model.max_sequence_length)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (1, length), generator=generator)
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return {
        "input_ids": ids.to(device),
        "position_ids": torch.arange(length, device=device)[None],
        "attention_mask": hidden.to(device),
    }


def _logits(model: Any, output: Tensor) -> Tensor:
    """Return the logits of the whole vocabulary, ``(batch, tokens, vocab)``."""
    if not model.parallel_output or get_pg_size(model.output_layer.tp_group) == 1:
        return output
    found: Tensor = gather_from_tensor_model_parallel_region(
        output, group=model.output_layer.tp_group
    )
    return found
