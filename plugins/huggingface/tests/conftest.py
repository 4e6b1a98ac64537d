"""A tiny Llama on disk, with the tokenizer of the demo model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from bittern_huggingface.demo.command import DEMO


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    return DEMO / "model"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16: 2 layers, hidden 128, vocabulary 2048, untied head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, path / name)
    return path


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 2048, (2, 32), generator=generator)} for _ in range(2)]
