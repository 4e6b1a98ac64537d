"""Saving and restoring through dist_checkpointing, on one rank, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

import megatron_models
from bittern.checkpoint.tensors import load_quantizers, quantizer_tensors
from bittern.errors import CheckpointError
from bittern.toolkit import Toolkit
from bittern_megatron import checkpoint
from megatron_models import batch, gpt

NORM = {"match": "decoder.final_layernorm", "input": {"format": "int8", "granularity": "tensor"}}
RECIPE = {"extends": "int8", "rules": [NORM]}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Megatron's groups, in a process group of one."""
    megatron_models.ensure_groups()
    with megatron_models.on_cpu():
        yield
    megatron_models.leave_groups()


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return Toolkit(plugins=["megatron"])


@pytest.fixture(scope="module")
def model(toolkit: Toolkit) -> nn.Module:
    """A quantized model; a norm's input is quantized too, by core's rule."""
    found = gpt()
    toolkit.quantize(found, RECIPE, [batch(0)])
    return found


@pytest.fixture(scope="module")
def saved(model: nn.Module, toolkit: Toolkit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "state"
    toolkit.save(model, path)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


class Wrapper(nn.Module):
    """Stands around a model as Megatron's wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Any:
        return self.module(**inputs)


@torch.no_grad()
def other() -> Any:
    """Return a model with other weights."""
    found = gpt()
    for parameter in found.parameters():
        parameter.fill_(0.25)
    return found


def written(path: Path) -> set[str]:
    return {p.name for p in (path / checkpoint.FOLDER).iterdir()}


@torch.no_grad()
def test_a_saved_state_is_restored_bit_by_bit(
    saved: Path, model: nn.Module, toolkit: Toolkit
) -> None:
    assert json.loads((saved / "manifest.json").read_text())["io"] == "megatron"
    fresh = other()
    toolkit.restore(fresh, saved)
    assert torch.equal(fresh(**batch(1)), model(**batch(1)))
    found, expected = quantizer_tensors(fresh), quantizer_tensors(model)
    assert "bittern.quantizers/decoder.final_layernorm.input/amax" in expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_no_file_is_a_pickle(saved: Path) -> None:
    tensors = "shard-00001-model-00001-of-00001.safetensors"
    assert written(saved) == {"metadata.json", tensors}
    assert json.loads((saved / checkpoint.FOLDER / "metadata.json").read_text()) == {
        "sharded_backend": "safetensors",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    keys = load_file(saved / checkpoint.FOLDER / tensors).keys()
    assert "decoder.layers.1.mlp.linear_fc1.weight_quantizer.scale.part1" in keys


def test_an_index_of_others_that_calls_is_refused(model: nn.Module, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'called'}",)

    index = Metadata(state_dict_metadata={}, planner_data=Evil())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="could run code"):
        checkpoint.entries_to_load(model, tmp_path)
    assert not (tmp_path / "called").exists()


def test_an_index_of_others_that_is_damaged_is_said_to_be(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"no": "index"}))
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(CheckpointError, match="it cannot be read"):
        checkpoint.entries_to_load(model, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "not json"])
@torch.no_grad()
def test_a_damaged_checkpoint_leaves_the_model_as_it_was(
    damage: str, copied: Path, toolkit: Toolkit
) -> None:
    folder = copied / checkpoint.FOLDER
    (tensors,) = folder.glob("*.safetensors")
    if damage == "missing":
        tensors.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    else:
        (folder / "metadata.json").write_text("{")
    fresh = other()
    before = {name: p.clone() for name, p in fresh.named_parameters()}
    with pytest.raises(CheckpointError):
        toolkit.restore(fresh, copied)
    assert all(torch.equal(before[name], p) for name, p in fresh.named_parameters())
    assert toolkit.plan(fresh, "int8").modules  # and it is not quantized


def test_another_model_is_named(saved: Path, toolkit: Toolkit) -> None:
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight is .* here and .* there"):
        toolkit.restore(gpt(ffn_hidden_size=64), saved)


@torch.no_grad()
def test_a_wrapper_changes_no_name(model: nn.Module, toolkit: Toolkit, tmp_path: Path) -> None:
    wrapped = Wrapper(model)
    checkpoint.save(wrapped, quantizer_tensors(wrapped), tmp_path)
    fresh = Wrapper(other())
    toolkit.convert(
        fresh,
        toolkit.plan(
            fresh,
            {"extends": "int8", "rules": [{**NORM, "match": "module.decoder.final_layernorm"}]},
        ),
    )
    quantizers, fill = checkpoint.load(fresh, tmp_path)
    load_quantizers(fresh, quantizers)
    fill()
    assert torch.equal(fresh(**batch(1)), model(**batch(1)))


@torch.no_grad()
def test_every_expert_keeps_its_own_ranges(toolkit: Toolkit, tmp_path: Path) -> None:
    experts = {"num_moe_experts": 4, "moe_router_topk": 2}
    model, fresh = gpt(**experts), gpt(**experts)
    toolkit.quantize(model, "int8-weight-only")
    toolkit.save(model, tmp_path / "state")
    for parameter in fresh.parameters():
        parameter.fill_(0.25)
    toolkit.restore(fresh, tmp_path / "state")
    found, expected = quantizer_tensors(fresh), quantizer_tensors(model)
    name = (
        "bittern.quantizers/decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc2.weight/amax"
    )
    assert len({expected[name.format(i, j)].sum().item() for i in (0, 1) for j in range(4)}) == 8
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))


@torch.no_grad()
def test_compressed_weights_compute_and_are_not_saved(toolkit: Toolkit, tmp_path: Path) -> None:
    model = gpt()
    toolkit.quantize(model, "int8-weight-only")
    expected = model(**batch(0))
    toolkit.apply_mode(model, "compress")
    assert torch.equal(model(**batch(0)), expected)
    with pytest.raises(CheckpointError, match=r"linear_proj: its weight is compressed"):
        toolkit.save(model, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_what_only_a_pickle_could_hold_is_refused(tmp_path: Path) -> None:
    model = gpt()
    layer = model.decoder.layers[0].mlp.linear_fc2
    layer.get_extra_state = lambda: {"not": "a tensor"}
    with pytest.raises(CheckpointError, match=r"it is a dict, and only tensors are saved"):
        checkpoint.save(model, {}, tmp_path)


def test_a_state_of_core_is_restored_by_core(
    model: nn.Module, toolkit: Toolkit, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert checkpoint.make_io(model, tmp_path) is None
    (tmp_path / checkpoint.FOLDER).mkdir()
    assert checkpoint.make_io(model, tmp_path) is not None
