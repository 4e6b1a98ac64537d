"""States of models that several processes hold: FSDP2 through torch DCP, DDP by rank 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sharded_models import Model, batches, build, shard
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import bittern as bt
from bittern.checkpoint.stage import shared_stage
from bittern.errors import CheckpointError
from bittern.nn import named_quantizers
from bittern.testing import ChildFailedError, run_distributed

TIMEOUT = 120.0
RECIPE = "nvfp4"


def quantized(seed: int = 0) -> Model:
    model = build(seed)
    bt.quantize(model, RECIPE, data=batches())
    return model


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(batches()[0])
    return found


def columns(parameter: nn.Parameter) -> Shard:
    """Shard what has an even second axis there, the rest by rows."""
    even = parameter.dim() > 1 and parameter.shape[1] % 2 == 0
    return Shard(1 if even else 0)


def save_all(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    """Save models in shards before and after conversion, in DDP, and a state without weights."""
    found = {}
    sharded = shard(build(), world)
    bt.quantize(sharded, RECIPE, data=batches())
    found["sharded"] = output(sharded)
    bt.save(sharded, f"{folder}/sharded")
    bt.save(sharded, f"{folder}/sharded", overwrite=True)
    bt.save(sharded, f"{folder}/beside", state_only=True)
    model = quantized(1)
    found["later"] = output(model)
    bt.save(shard(model, world), f"{folder}/later")
    model = quantized(2)
    found["ddp"] = output(model)
    bt.save(DistributedDataParallel(model), f"{folder}/ddp")
    return found


def restore_all(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    """Restore everything into models that are sharded otherwise, and into DDP."""
    found = {}
    for name in ("sharded", "later", "ddp", "plain"):
        model = shard(build(7), world, shard_placement_fn=columns)
        bt.restore(model, f"{folder}/{name}")
        found[name] = output(model)
        found[f"{name} tied"] = torch.tensor(model.head.weight is model.embed.weight)
    wrapped = DistributedDataParallel(build(7))
    bt.restore(wrapped, f"{folder}/sharded")
    found["into ddp"] = output(wrapped)
    beside = shard(build(), world)
    bt.restore(beside, f"{folder}/beside")
    found["beside"] = output(beside)
    try:
        bt.restore(shard(build(3), world), f"{folder}/beside")
    except CheckpointError as error:
        found["other weights"] = torch.tensor("is not the weight" in str(error))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, torch.Tensor]:
    model = quantized(4)
    bt.save(model, folder / "plain")
    ranks = run_distributed(save_all, str(folder), timeout=TIMEOUT)
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    return {**ranks[0], "plain": output(model)}


@pytest.fixture(scope="module")
def restored(folder: Path, saved: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    found: list[dict[str, torch.Tensor]] = run_distributed(
        restore_all, str(folder), timeout=TIMEOUT
    )
    return found


@pytest.mark.parametrize("name", ["sharded", "later", "ddp", "plain"])
def test_one_process_restores_what_two_saved(
    name: str, folder: Path, saved: dict[str, torch.Tensor]
) -> None:
    model = build(9)
    bt.restore(model, folder / name)

    assert model.head.weight is model.embed.weight
    assert torch.equal(output(model), saved[name])


@pytest.mark.parametrize("name", ["sharded", "later", "ddp", "plain"])
def test_two_processes_restore_into_other_shards(
    name: str, saved: dict[str, torch.Tensor], restored: list[dict[str, torch.Tensor]]
) -> None:
    for rank in restored:
        assert torch.equal(rank[name], saved[name])
        assert bool(rank[f"{name} tied"])


def test_shards_are_restored_into_ddp(
    saved: dict[str, torch.Tensor], restored: list[dict[str, torch.Tensor]]
) -> None:
    for rank in restored:
        assert torch.equal(rank["into ddp"], saved["sharded"])


def test_a_state_beside_weights_in_shards_knows_them(
    saved: dict[str, torch.Tensor], restored: list[dict[str, torch.Tensor]]
) -> None:
    for rank in restored:
        assert torch.equal(rank["beside"], saved["sharded"])
        assert bool(rank["other weights"])


@pytest.mark.usefixtures("saved")
def test_each_rank_wrote_its_own_part_and_nobody_a_pickle(folder: Path) -> None:
    names = sorted(p.name for p in (folder / "sharded").rglob("*") if p.is_file())
    shards = sorted((folder / "sharded" / "shards").iterdir())
    assert names == sorted(["manifest.json", "state.safetensors", *(p.name for p in shards)])
    rows = []
    for file in shards:  # safetensors opens them, so they are no pickles
        with safe_open(file, framework="pt") as content:
            rows.append(content.get_slice("layers.0.0.weight").get_shape()[0])
    assert rows == [3, 2]  # 5 rows over two ranks
    manifest = json.loads((folder / "sharded" / "manifest.json").read_text())
    assert manifest["io"] == "dcp"
    assert json.loads((folder / "ddp" / "manifest.json").read_text())["io"] == "safetensors"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_shard_is_noticed(rank: int, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "sharded", tmp_path / "state")
    sorted((tmp_path / "state" / "shards").iterdir())[rank].unlink()
    model = build(9)
    before = output(model)

    with pytest.raises(CheckpointError):
        bt.restore(model, tmp_path / "state")
    assert torch.equal(output(model), before)
    assert not list(named_quantizers(model))


@pytest.mark.usefixtures("saved")
def test_a_truncated_shard_is_noticed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "sharded", tmp_path / "state")
    file = min((tmp_path / "state" / "shards").iterdir())
    file.write_bytes(file.read_bytes()[:-8])

    with pytest.raises(CheckpointError, match=r"shard"):
        bt.restore(build(9), tmp_path / "state")


def fail(rank: int, world: int, folder: str) -> list[str]:
    """Return what each rank is told when saving fails on one."""
    found = []

    def told(model: nn.Module, path: str, **options: Any) -> None:
        try:
            bt.save(model, path, **options)
        except CheckpointError as error:
            found.append(str(error))
        else:
            found.append("")

    model = shard(quantized(), world)
    Path(folder, "mine").mkdir(exist_ok=True)
    Path(folder, "mine", "file").touch()
    told(model, f"{folder}/mine")  # rank 0 cannot have the directory
    told(model if rank == 0 else build(), f"{folder}/two")  # rank 1 has nothing to save
    told(model, f"{folder}/three")
    return found


def test_an_error_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    for told in run_distributed(fail, str(tmp_path), timeout=TIMEOUT):
        assert "rank 0 of 2 failed: the output directory is not empty" in told[0]
        assert "rank 1 of 2 failed: this model is not quantized" in told[1]
        assert told[2] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "three"]


def die(rank: int, world: int, folder: str) -> None:
    """Kill rank 1 when each rank has written something."""
    try:
        with shared_stage(Path(folder, "state")) as stage:
            (stage / str(rank)).touch()
            dist.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except CheckpointError as error:
        Path(folder, "told").write_text(str(error))
        raise


def test_a_killed_rank_ends_the_others_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError):
        run_distributed(die, str(tmp_path), timeout=TIMEOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["told"]
    assert "another rank ended" in (tmp_path / "told").read_text()
