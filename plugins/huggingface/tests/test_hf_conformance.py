"""The plugin passes the conformance kit."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from bittern.testing import ExportCase, ExporterConformance, PluginConformance


class TestPlugin(PluginConformance):
    plugin = "huggingface"


def tiny_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def tokens(generator: torch.Generator) -> list[dict[str, Any]]:
    return [{"input_ids": torch.randint(0, 256, (2, 32), generator=generator)} for _ in range(2)]


class TestCompressedTensors(ExporterConformance):
    plugin = "huggingface"
    format = "compressed-tensors"

    def cases(self) -> list[ExportCase]:
        per_column = {"format": "int8", "granularity": "channel", "axis": 1}
        return [
            ExportCase(
                "llama-int8",
                make=tiny_llama,
                recipe="int8",
                data=tokens,
                unsupported={"rules": [{"match": "*.down_proj", "weight": per_column}]},
            )
        ]
