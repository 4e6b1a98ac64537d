"""State in transformers' own files: saved, loaded by transformers, restored and loaded by us."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper as checkpointed,
)

import bittern as bt
from bittern.errors import CheckpointError, ModelError
from bittern.nn import QuantModule, named_quantizers, original_class
from bittern.records import LoadConfig
from bittern_huggingface.state import checkpoint_io

IDS = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**SMALL, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def quantized(make: Callable[[], Any] = llama, recipe: str = "int8") -> Any:
    torch.manual_seed(0)
    model = make()
    bt.quantize(model, recipe, [{"input_ids": IDS}])
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def different(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return make()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = quantized()
    path = tmp_path_factory.mktemp("state") / "saved"
    bt.save(model, path)
    return model, path


def unsealed(source: Path, target: Path) -> Path:
    """Copy a state, without the checksums that its files are to have."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    del manifest["checksums"], manifest["checksum"]
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        (llama, "nvfp4"),
        (lambda: llama(tie_word_embeddings=True), "int8-smoothquant"),
        (mixtral, "fp8"),
        (gpt2, "int4"),
    ],
    ids=["llama", "tied", "experts", "conv1d"],
)
def test_a_model_comes_back_bit_for_bit(
    make: Callable[[], Any], recipe: str, tmp_path: Path
) -> None:
    model = quantized(make, recipe)
    expected = logits(model)
    bt.save(model, tmp_path / "state")

    fresh = different(make)
    config = fresh.config.to_dict()
    attention = fresh.config._attn_implementation
    bt.restore(fresh, tmp_path / "state")
    assert torch.equal(logits(fresh), expected)
    assert (fresh.config.to_dict(), fresh.config._attn_implementation) == (config, attention)

    loaded = bt.load(str(tmp_path / "state"))
    assert torch.equal(logits(loaded), expected)
    assert [mode.name for mode in bt.modes_of(loaded)] == ["quantize"]
    assert not loaded.training

    bt.revert(loaded)
    plain = original_class(fresh).from_pretrained(tmp_path / "state")
    assert torch.equal(logits(loaded), logits(plain.eval()))


def test_transformers_reads_the_plain_model_without_a_word(
    saved: tuple[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, path = saved
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        with caplog.at_level(logging.INFO, logger="transformers.modeling_utils"):
            plain, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True
            )
    finally:
        logger.propagate = before
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert type(plain) is transformers.LlamaForCausalLM
    assert not any(isinstance(module, QuantModule) for module in plain.modules())


def test_experts_lie_on_disk_under_the_names_of_the_architecture(tmp_path: Path) -> None:
    bt.save(quantized(mixtral, "fp8-dynamic"), tmp_path / "state")
    names = set(load_file(tmp_path / "state" / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names


def test_half_precision_and_a_float32_layer_keep_every_bit(tmp_path: Path) -> None:
    def mixed() -> Any:
        model = llama().to(torch.bfloat16)
        model.model.norm.float()
        model.model.norm.weight.data.uniform_(0.5, 1.5)
        return model

    model = quantized(mixed, "fp8-dynamic")
    bt.save(model, tmp_path / "state")
    fresh = different(mixed)
    bt.restore(fresh, tmp_path / "state")
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_model_in_half_precision_is_loaded_in_it_when_asked(tmp_path: Path) -> None:
    def half() -> Any:  # not .to(bfloat16), which rounds buffers that no file holds
        config = transformers.LlamaConfig(**SMALL)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    uniform = quantized(half, "fp8-dynamic")
    bt.save(uniform, tmp_path / "uniform")
    loaded = bt.load(str(tmp_path / "uniform"), config=LoadConfig(dtype="bfloat16"))
    assert torch.equal(logits(loaded), logits(uniform))


def test_shards_are_read(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    fresh = different(llama)
    bt.restore(fresh, copy)
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(bt.load(str(copy))), logits(model))


def test_the_config_names_the_class_and_generation_settings_are_kept(tmp_path: Path) -> None:
    model = quantized()
    model.config.architectures = None
    model.generation_config.max_new_tokens = 7
    bt.save(model, tmp_path / "state")
    config = json.loads((tmp_path / "state" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert bt.load(str(tmp_path / "state")).generation_config.max_new_tokens == 7


def test_the_tokenizer_goes_along(tiny_dir: Path, tmp_path: Path) -> None:
    model = bt.load(str(tiny_dir))
    bt.quantize(model, "int8-weight-only")
    bt.save(model, tmp_path / "state")
    assert (tmp_path / "state" / "tokenizer.json").is_file()


def test_state_beside_weights_that_somebody_saved(tmp_path: Path) -> None:
    model = quantized(recipe="int8-smoothquant")
    model.save_pretrained(tmp_path / "weights")
    bt.save(model, tmp_path / "state", state_only=True)

    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "weights").eval()
    bt.restore(fresh, tmp_path / "state")
    assert torch.equal(logits(fresh), logits(model))

    with pytest.raises(CheckpointError, match="saved beside"):
        bt.restore(different(llama), tmp_path / "state")

    bt.save(model, tmp_path / "weights" / "bittern", state_only=True)
    assert torch.equal(logits(bt.load(str(tmp_path / "weights"))), logits(model))


def test_a_wrapped_model_is_saved_and_restored_as_the_model_within(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = saved
    bt.save(torch.compile(model), tmp_path / "state")
    assert set(load_file(tmp_path / "state" / "model.safetensors")) == set(
        load_file(path / "model.safetensors")
    )
    fresh = torch.compile(different(llama))
    bt.restore(fresh, path)
    assert torch.equal(logits(fresh._orig_mod), logits(model))


def test_a_model_with_wrapped_blocks_is_saved_and_restored_under_its_own_names(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = saved

    def with_wrapped_blocks(network: Any) -> Any:
        layers = network.model.layers
        layers[0], layers[1] = torch.compile(layers[0], backend="eager"), checkpointed(layers[1])
        return network

    fresh = with_wrapped_blocks(different(llama))
    bt.restore(fresh, path)
    assert torch.equal(logits(fresh), logits(model))
    bt.save(fresh, tmp_path / "state")
    assert torch.equal(logits(bt.load(str(tmp_path / "state"))), logits(model))


def test_learned_ranges_stay_out_of_the_files_of_transformers(tmp_path: Path) -> None:
    model = quantized()
    for _, quantizer in named_quantizers(model):
        quantizer.learn()
    bt.save(model, tmp_path / "state")
    assert not any("quantizer" in n for n in load_file(tmp_path / "state" / "model.safetensors"))
    loaded = bt.load(str(tmp_path / "state"))
    assert torch.equal(logits(loaded), logits(model))
    assert all(quantizer.learned is not None for _, quantizer in named_quantizers(loaded))


def test_the_state_of_another_architecture_changes_nothing(saved: tuple[Any, Path]) -> None:
    _, path = saved
    other = different(lambda: llama(intermediate_size=96))
    before = logits(other)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+\.weight"):
        bt.restore(other, path)
    assert torch.equal(logits(other), before)
    assert not any(isinstance(module, QuantModule) for module in other.modules())


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors"])
def test_damaged_files_are_one_clear_error(
    saved: tuple[Any, Path], tmp_path: Path, file: str
) -> None:
    copy = unsealed(saved[1], tmp_path / "copy")
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"cannot|cut off"):
        bt.restore(different(llama), copy)
    with pytest.raises((CheckpointError, ModelError)):
        bt.load(str(copy))


def test_a_missing_weight_is_named(saved: tuple[Any, Path], tmp_path: Path) -> None:
    copy = unsealed(saved[1], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing weights: model\.norm\.weight"):
        bt.restore(different(llama), copy)


def test_offloaded_weights_are_refused(saved: tuple[Any, Path]) -> None:
    model = different(llama)
    model.lm_head.to("meta")
    with pytest.raises(CheckpointError, match="offloaded"):
        bt.restore(model, saved[1])


def test_pickled_weights_beside_a_state_are_not_read(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(saved[1], tmp_path / "copy")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").rename(copy / "elsewhere.safetensors")
    with pytest.raises(CheckpointError):
        bt.restore(different(llama), copy)
    with pytest.raises((CheckpointError, ModelError)):
        bt.load(str(copy))


def test_a_state_without_a_config_says_what_to_do(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    bt.quantize(model, "int8-weight-only")
    bt.save(model, tmp_path / "state")
    with pytest.raises(ModelError, match=r"bittern\.restore"):
        bt.load(str(tmp_path / "state"))


@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_are_saved_packed_and_loaded_so(tied: bool, tmp_path: Path) -> None:
    def make() -> Any:
        return llama(tie_word_embeddings=tied)

    model = quantized(make, "int4")
    bt.save(model, tmp_path / "plain")
    bt.apply_mode(model, "compress")
    expected = logits(model)
    bt.save(model, tmp_path / "packed")
    assert size(tmp_path / "packed") < 0.5 * size(tmp_path / "plain")

    fresh = different(make)
    bt.restore(fresh, tmp_path / "packed")
    assert torch.equal(logits(fresh), expected)
    loaded = bt.load(str(tmp_path / "packed"))
    assert torch.equal(logits(loaded), expected)
    assert [mode.name for mode in bt.modes_of(loaded)] == ["quantize", "compress"]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_other_models_are_left_to_core() -> None:
    assert checkpoint_io(nn.Linear(2, 2)) is None


def test_a_state_that_does_not_fit_leaves_the_weights_as_they_were(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    copy = unsealed(saved[1], tmp_path / "copy")
    tensors = load_file(copy / "state.safetensors")
    save_file(
        tensors | {"bittern.quantizers/x.weight/amax": torch.ones(())}, copy / "state.safetensors"
    )
    model = different(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'x\.weight'"):
        bt.restore(model, copy)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors"])
def test_a_changed_bit_is_not_loaded(saved: tuple[Any, Path], tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(saved[1], tmp_path / "copy")
    data = bytearray((copy / file).read_bytes())
    data[-5] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(CheckpointError, match="changed since it was saved"):
        bt.restore(different(llama), copy)
    with pytest.raises(CheckpointError, match="changed since it was saved"):
        bt.load(str(copy))


def test_weights_of_an_output_layer_are_not_tied_away(saved: tuple[Any, Path]) -> None:
    tied = different(lambda: llama(tie_word_embeddings=True))
    before = logits(tied)
    with pytest.raises(CheckpointError, match="output layer has weights of its own"):
        bt.restore(tied, saved[1])
    assert torch.equal(logits(tied), before)
