"""On a GPU: compressed weights free memory, states come back, compiled training has gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bittern as bt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
RECIPES = ["int8", "int4", "fp8", "nvfp4", "mxfp4", "mxfp8", "nf4"]


def network(width: int = 256, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers).to("cuda", dtype).eval()


def inputs(width: int = 256, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, width, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compressed_model_computes_the_same_bits(recipe: str, tmp_path: Path) -> None:
    model = network()
    bt.quantize(model, recipe, [inputs()])
    with torch.no_grad():
        expected = model(inputs())
        bt.compress(model)
        assert torch.equal(model(inputs()), expected)
        bt.save(model, tmp_path / "state")
        fresh = network()
        bt.restore(fresh, tmp_path / "state")
        assert fresh[0].weight.device.type == "cuda"
        assert torch.equal(fresh(inputs()), expected)


@pytest.mark.parametrize("recipe", ["int8", "nvfp4"])
def test_gradients_of_a_compiled_model_are_those_of_eager(recipe: str) -> None:
    model = network(dtype=torch.float32)
    bt.quantize(model, recipe, [inputs(dtype=torch.float32)])
    training = bt.train_ranges(model, activations="ema" if recipe == "int8" else "fixed")
    model.train()
    x = inputs(dtype=torch.float32)
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    eager, compiled = found
    assert len(eager) == len(compiled) == 4
    for one, two in zip(eager, compiled, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(two, one, rtol=2e-2, atol=2e-2 * float(one.abs().max()))
    training.step()
    training.finish()
