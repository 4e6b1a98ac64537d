"""Every shipped recipe comes back bit for bit, in this process and in a fresh one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.nn import named_quantizers
from bittern.testing import assert_bit_identical, run_fresh

TOOLS = bt.Toolkit(block=["*"])
RECIPES = sorted(set(TOOLS.registry.recipes) - {"base"})


class Net(nn.Module):
    """What recipes speak of: linears, a convolution with its BatchNorm, a norm that folds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.up = nn.Linear(128, 256)
        self.conv = nn.Conv2d(16, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(self.norm(x))).reshape(-1, 16, 4, 4)
        output: Tensor = self.down(torch.relu(self.bn(self.conv(x))).flatten(1))
        return output


def network(seed: int) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net().eval()
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        return model


def inputs(seed: int = 3) -> Tensor:
    return torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Net]]:
    folder = tmp_path_factory.mktemp("states")
    found = {}
    for recipe in RECIPES:
        model = network(0)
        TOOLS.quantize(model, recipe, [inputs(1), inputs(2)])
        TOOLS.save(model, folder / recipe)
        found[recipe] = (folder / recipe, model)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_restored_model_is_the_saved_one(recipe: str, saved: dict[str, tuple[Path, Net]]) -> None:
    path, model = saved[recipe]
    fresh = network(1)
    TOOLS.restore(fresh, path)
    with torch.no_grad():
        assert_bit_identical(model(inputs()), fresh(inputs()), what=recipe)
    states = [{n: q.state() for n, q in named_quantizers(m)} for m in (model, fresh)]
    assert_bit_identical(*states, what="state of the quantizers")
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]


def test_a_fresh_process_computes_the_same(saved: dict[str, tuple[Path, Net]]) -> None:
    found = run_fresh(restored, {name: str(path) for name, (path, _) in saved.items()})
    with torch.no_grad():
        expected = {name: model(inputs()) for name, (_, model) in saved.items()}
    assert_bit_identical(expected, found, what="outputs")


def restored(paths: dict[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, path in paths.items():
        model = network(1)
        TOOLS.restore(model, path)
        with torch.no_grad():
            found[name] = model(inputs())
    return found
