"""Weights in shards (FSDP2) are neither packed nor folded, and states of packed ones stay whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharded_models import batches, build, shard
from torch import nn

import bittern as bt
from bittern.errors import BitternError
from bittern.nn.packed import PackedWeight
from bittern.testing import run_distributed


def told(call: object, *args: object) -> str:
    """Return what a call that has to fail says."""
    assert callable(call)
    with pytest.raises(BitternError) as caught:
        call(*args)
    return str(caught.value)


def packed(model: nn.Module) -> int:
    return sum(isinstance(parameter, PackedWeight) for parameter in model.parameters())


def both_orders(rank: int, world: int, folder: str) -> dict[str, object]:
    """Compress and fold models in shards, and shard a compressed one."""
    found: dict[str, object] = {}
    sharded = shard(build(), world)
    bt.quantize(sharded, "int8-weight-only", data=batches())
    with torch.no_grad():
        before = sharded(batches()[0])  # leaves the weights of the outermost module whole
        found["compress"] = told(bt.compress, sharded)
        found["fold"] = told(bt.fold, sharded)
        found["same"] = torch.equal(sharded(batches()[0]), before)

    model = build()
    bt.quantize(model, "int8-weight-only")
    bt.compress(model)
    bt.save(model, f"{folder}/packed")
    found["restore"] = told(bt.restore, shard(build(1), world), f"{folder}/packed")
    found["save"] = told(bt.save, shard(model, world), f"{folder}/none")
    fresh = build(2)
    bt.restore(fresh, f"{folder}/packed")
    found["packed"] = packed(fresh)
    return found


def test_weights_in_shards_are_left_alone_and_named(tmp_path: Path) -> None:
    for found in run_distributed(both_orders, str(tmp_path), timeout=120.0):
        assert found["same"]
        assert "no quantized weight that can be packed" in str(found["compress"])
        assert "lies in shards" in str(found["compress"])
        assert "lies in shards" in str(found["fold"])
        assert "is packed there, and lies in shards here" in str(found["restore"])
        assert "was packed, and is a" in str(found["save"])
        assert found["packed"]
    assert not (tmp_path / "none").exists()
