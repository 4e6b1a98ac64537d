"""Transformers models whose weights stay on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import bittern as bt
from bittern.errors import ModelError
from bittern.records import LoadConfig

DISK = LoadConfig(device="disk")


def save(path: Path, config: Any, **options: Any) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, **options)
    return str(path)


def llama(**changes: Any) -> LlamaConfig:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    return LlamaConfig(**{**shape, **heads, **changes})


def rows() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 320, (2, 16))} for _ in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "1MB"}])
def test_logits_are_those_of_the_model_in_memory(tied: Any, shards: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "m", llama(tie_word_embeddings=tied), **shards)
    plain, disk = bt.load(source), bt.load(source, config=DISK)
    assert {p.device.type for p in disk.model.layers.parameters()} == {"cpu", "meta"}
    for batch in rows():
        assert torch.equal(plain(**batch).logits, disk(**batch).logits)


def test_quantized_exported_and_verified(tmp_path: Path) -> None:
    source = save(tmp_path / "m", llama())
    plain, disk = bt.load(source), bt.load(source, config=DISK)
    bt.quantize(plain, "int8-smoothquant", rows(), layerwise=True)
    bt.quantize(disk, "int8-smoothquant", rows(), work_dir=tmp_path / "work")
    with torch.no_grad():
        assert torch.equal(plain(**rows()[0]).logits, disk(**rows()[0]).logits)
    bt.export(disk, tmp_path / "out")
    assert bt.verify(tmp_path / "out").ok


def test_tensors_that_have_to_be_converted_are_said_to_be(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=320,
    )
    source = save(tmp_path / "m", config)
    with pytest.raises(ModelError, match="cannot be read block by block"):
        bt.load(source, config=DISK)
