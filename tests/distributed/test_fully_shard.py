"""FSDP2 (two processes, gloo) before and after conversion equals one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded_models import batches, build, shard
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

import bittern as bt
from bittern.nn import QuantModule, named_quantizers
from bittern.testing import run_distributed

TIMEOUT = 120.0
RECIPES = ["int8", "nvfp4", "int8-smoothquant"]
CASES = [(recipe, first) for recipe in RECIPES for first in ("shard", "quantize")]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, quantizer in named_quantizers(model):
        found |= {f"{name}/{key}": value for key, value in quantizer.state().items()}
    return found


def one_process(recipe: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Return state, output and gradients without any sharding."""
    model = build()
    bt.quantize(model, recipe, data=batches())
    return state(model), *step(model)


def step(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return output and whole gradients of one step."""
    model.train()
    out = model(batches()[0])
    out.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return out.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def all_recipes(rank: int, world: int) -> dict[str, Any]:
    return {f"{r} {first}": sharded(rank, world, r, first) for r, first in CASES}


def sharded(rank: int, world: int, recipe: str, first: str) -> dict[str, Any]:
    model = build()
    data = batches() if recipe == "int8-smoothquant" else batches()[rank::world]
    if first == "shard":
        shard(model, world)
        model(batches()[0])  # leaves the weights of the root unsharded
    bt.quantize(model, recipe, data=data)
    if first == "quantize":
        shard(model, world)
    found = state(model)
    out, grads = step(model)
    bt.revert(model)
    left = [m for m in model.modules() if isinstance(m, QuantModule)]
    still = sum(isinstance(m, FSDPModule) for m in model.modules())
    plain = model.eval()(batches()[0]).detach()
    return {
        "state": found,
        "out": out,
        "grads": grads,
        "left": len(left),
        "still": still,
        "plain": plain,
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(all_recipes, timeout=TIMEOUT)


@pytest.mark.parametrize(("recipe", "first"), CASES)
def test_sharded_equals_one_process(recipe: str, first: str, ranks: list[dict[str, Any]]) -> None:
    expected, out, grads = one_process(recipe)

    both = [found[f"{recipe} {first}"] for found in ranks]
    for found in both:
        assert found["state"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found["state"][name], value), name
        torch.testing.assert_close(found["out"], out)
        assert len(found["grads"]) == len(grads)
        for mine, theirs in zip(found["grads"], grads, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert found["left"] == 0
        assert found["still"] == 3  # reverting leaves the sharding alone
        assert torch.equal(found["plain"], both[0]["plain"])
    if recipe != "int8-smoothquant":
        torch.testing.assert_close(both[0]["plain"], build()(batches()[0]))


def leaves(rank: int, world: int) -> dict[str, Any]:
    """Shard single Linears, whose class is then ours and FSDP2's at once."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    x = torch.ones(2, 8)
    plain = model(x).detach()
    bt.quantize(model, "int8-weight-only")
    expected = model(x).detach()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    names = [type(layer).__name__ for layer in model]
    out = model(x).detach()
    bt.revert(model)
    reverted = [type(layer).__name__ for layer in model]
    after = model(x).detach()
    bt.quantize(model, "int8-weight-only")
    again = model(x).detach()
    return {
        "names": names,
        "reverted": reverted,
        "same": [torch.equal(out, expected), torch.equal(after, plain), torch.equal(again, out)],
    }


def test_a_class_that_fsdp2_puts_over_ours_stays_when_ours_goes() -> None:
    for found in run_distributed(leaves, timeout=TIMEOUT):
        assert found["names"] == ["FSDPQuantLinear"] * 2
        assert found["reverted"] == ["FSDPLinear"] * 2
        assert found["same"] == [True, True, True]


def frozen(rank: int, world: int) -> list[bool]:
    """Change frozen weights in their shards, between forward passes.

    Whole weights come and go without a trace: their version stays 0, and now and then one comes to
    the place in memory where it was before.
    """
    model, plain = build(), build()
    for part in (model, plain):
        bt.quantize(part, "int8-weight-only")
        part.requires_grad_(False)
    shard(model, world)
    x, same = batches()[0], []
    with torch.no_grad():
        for _ in range(8):
            same.append(torch.allclose(model(x), plain(x), atol=1e-6))
            for parameter in (*model.parameters(), *plain.parameters()):
                parameter.mul_(0.7)
    return same


def test_a_frozen_weight_that_changes_in_its_shards_is_quantized_again() -> None:
    assert run_distributed(frozen, timeout=TIMEOUT) == [[True] * 8] * 2
