"""A work directory: what is done is kept, a killed run goes on, another run is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.calibration.workdir import WorkDir
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers
from bittern.records import Algorithm, CalibrationSummary
from bittern.toolkit import Toolkit


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 64)
        self.gate, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.norm(x)
        return (x + self.down(self.up(y) * self.gate(y).relu()),)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(32, 32), nn.Linear(32, 32)
        self.layers = nn.ModuleList(Wide() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            (x,) = layer(x)
        found: Tensor = self.head(x)
        return found


def build() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def batches(seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(4, 32) for _ in range(3)]


def everything(model: nn.Module) -> dict[str, Tensor]:
    ranges = {f"{n}/{k}": v for n, q in named_quantizers(model) for k, v in q.state().items()}
    return {**model.state_dict(), **ranges}


RECIPES = ("nvfp4", "int8-smoothquant")


@pytest.mark.parametrize("recipe", RECIPES)
def test_with_and_without_a_work_directory_the_result_is_the_same(
    recipe: str, tmp_path: Path
) -> None:
    one, other = build(), build()
    bt.quantize(one, recipe, batches(), layerwise=True)
    bt.quantize(other, recipe, batches(), work_dir=tmp_path / "new" / "work")
    torch.testing.assert_close(everything(one), everything(other), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_finished_run_is_only_read(recipe: str, tmp_path: Path) -> None:
    one, other = build(), build()
    bt.quantize(one, recipe, batches(), work_dir=tmp_path)
    ran: list[str] = []
    for layer in other.layers:
        layer.up.register_forward_hook(lambda *_: ran.append("x"))
    bt.quantize(other, recipe, batches(), work_dir=tmp_path)
    torch.testing.assert_close(everything(one), everything(other), rtol=0, atol=0)
    assert len(ran) == 4 * 3  # what the engine tries on one batch, and nothing else


def notes(model: nn.Module, plan: Any, forward: Any, context: Any) -> None:
    """Note about every part that some experts saw no token."""
    from bittern.calibration.coverage import note_experts

    forward()
    for name, _ in context.quantizers(model):
        if name.endswith("input"):
            note_experts(context, name, torch.tensor([True, "up" in name, False]))


@pytest.mark.parametrize("left", [5, 6])
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(
    left: int,
    tmp_path: Path,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: Callable[..., Toolkit],
) -> None:
    def own() -> list[Algorithm]:
        return [Algorithm(name="notes", run=f"{__name__}:notes", needs=frozenset({"hessian"}))]

    toolkit = toolkit_with(make_plugin("alpha", register_algorithms=own))
    recipe = {"extends": "int8", "algorithm": [{"percentile": {"p": 99}}, "notes"], "skip": []}

    def summary(**how: Any) -> CalibrationSummary:
        result = toolkit.quantize(build(), recipe, batches(), **how)
        return replace(result.report.calibration, seconds=0)

    expected = summary(layerwise=True)
    assert len(expected.saturation) == 14
    assert expected.unseen_experts["layers.1.up.input"] == (2,)
    assert summary(work_dir=tmp_path) == expected
    for kind in ("after", "part"):
        for index in range(left, 6):
            (tmp_path / f"{kind}-{index:04}.safetensors").unlink()
    assert summary(work_dir=tmp_path) == expected


KILLED = """
import os, sys
sys.path.insert(0, os.path.dirname({file!r}))
import bittern as bt
from test_workdir import batches, build
seen = 0
def audit(event, args):
    global seen
    if event in ("os.rename", "os.remove", "open") and {work!r} in str(args[0]):
        seen += 1
        if seen == {at}:
            os.kill(os.getpid(), 9)
sys.addaudithook(audit)
bt.quantize(build(), {recipe!r}, batches(), work_dir={work!r})
"""


def test_killed_at_any_point_it_goes_on_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    """The process dies at a chosen operation on a file of the work directory, again and again."""
    recipe, work = "int8-smoothquant", tmp_path / "work"
    for at in (3, 9, 14, 17, 11):
        code = KILLED.format(file=__file__, work=str(work), recipe=recipe, at=at)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        found = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
        assert found.returncode == -9
    expected, resumed = build(), build()
    torch.set_num_threads(1)
    bt.quantize(expected, recipe, batches(), layerwise=True)
    before = len(list(work.glob("part-*")))
    bt.quantize(resumed, recipe, batches(), work_dir=work)
    assert 0 < before < 6
    torch.testing.assert_close(everything(expected), everything(resumed), rtol=0, atol=0)


def change_data(model: Model, given: dict[str, Any]) -> None:
    given["data"] = batches(2)


def change_weight(model: Model, given: dict[str, Any]) -> None:
    with torch.no_grad():
        model.layers[2].up.weight.mul_(1.01)


def change_recipe(model: Model, given: dict[str, Any]) -> None:
    given["overrides"] = ["algorithm.0.options.alpha=0.4"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_data, '"data": "blake2b'),
        (change_weight, "layers.2.up.weight"),
        (change_recipe, "0.4"),
    ],
)
def test_another_run_is_refused_and_said_to_be_another(
    change: Any, said: str, tmp_path: Path
) -> None:
    bt.quantize(build(), "int8-smoothquant", batches(), work_dir=tmp_path)
    model, given = build(), {"data": batches()}
    change(model, given)
    before = everything(model)
    with pytest.raises(CalibrationError, match="begun with something else") as caught:
        bt.quantize(model, "int8-smoothquant", work_dir=tmp_path, **given)
    assert said in str(caught.value)
    torch.testing.assert_close(everything(model), before, rtol=0, atol=0)


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        WorkDir(tmp_path, {}).locked(),
        pytest.raises(CalibrationError, match="another process"),
        WorkDir(tmp_path, {}).locked(),
    ):
        pass


def test_an_error_after_resuming_gives_the_model_back(tmp_path: Path) -> None:
    bt.quantize(build(), "int8-smoothquant", batches(), work_dir=tmp_path)
    for file in [*tmp_path.glob("part-0005*")]:
        file.write_bytes(b"damaged")
    model = build()
    before = everything(model)
    with pytest.raises(CalibrationError, match="part-0005"):
        bt.quantize(model, "int8-smoothquant", batches(), work_dir=tmp_path)
    torch.testing.assert_close(everything(model), before, rtol=0, atol=0)


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    class Odd(Wide):
        def forward(self, x: Tensor) -> Any:
            return {1, 2}

    model = nn.Sequential(nn.Sequential(Odd(), Odd()))
    model[0].forward = lambda x: [layer(x) for layer in model[0]] and x  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match="returns a set"):
        bt.quantize(model, {"extends": "int8", "rules": []}, batches(), work_dir=tmp_path)
