"""Weights on the disk: in memory while their block runs, changed only where that is kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bittern as bt
from bittern.errors import CalibrationError, CheckpointError, ModelError
from bittern.nn import named_quantizers
from bittern.runtime.ondisk import Place, held, is_held, move_to_disk, places_of
from bittern.toolkit import default_toolkit


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return found


def build() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block(), Block())
    return nn.Sequential(nn.Linear(32, 32), blocks, nn.Linear(32, 8)).eval()


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 32) for _ in range(3)]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """Return a model, and its twin with the blocks' matrices on the disk."""
    plain, twin = build(), build()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    places = {}
    for name, parameter in list(twin.named_parameters()):
        if name.startswith("1.") and parameter.dim() == 2:
            path, _, local = name.rpartition(".")
            meta = nn.Parameter(parameter.to("meta"))
            twin.get_submodule(path)._parameters[local] = meta
            places[name] = Place(tmp_path / "model.safetensors", name)
    move_to_disk(twin, ["1.0", "1.1", "1.2"], places)
    return plain, twin


Pair = tuple[nn.Module, nn.Module]


def devices(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


@torch.no_grad()
def test_the_model_computes_the_same_and_forgets_its_weights_again(pair: Pair) -> None:
    plain, twin = pair
    assert devices(twin) == {"cpu", "meta"}
    for x in batches():
        torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=0)
    assert devices(twin) == {"cpu", "meta"}


def test_weights_are_there_while_somebody_holds_them(pair: Pair) -> None:
    plain, twin = pair
    block = twin.get_submodule("1.1")
    with held(block), held(block):
        torch.testing.assert_close(
            block.state_dict(), plain.get_submodule("1.1").state_dict(), rtol=0, atol=0
        )
        assert is_held(twin.get_submodule("1.1.up"))
        assert not is_held(twin.get_submodule("1.0.up"))
    assert not is_held(twin.get_submodule("1.1.up"))


def test_they_go_when_a_forward_pass_fails(pair: Pair) -> None:
    _, twin = pair
    with pytest.raises(RuntimeError), torch.no_grad():
        twin(torch.randn(2, 5))
    with pytest.raises(RuntimeError), torch.no_grad():
        twin.get_submodule("1.0")(torch.randn(2, 5))
    assert not is_held(twin.get_submodule("1.0.up"))


@pytest.mark.parametrize("recipe", ["int8", "int8-smoothquant", "nvfp4", "int4"])
def test_quantized_block_by_block_it_is_the_model_in_memory(
    recipe: str, pair: Pair, tmp_path: Path
) -> None:
    plain, twin = pair
    bt.quantize(plain, recipe, batches(), layerwise=True)
    bt.quantize(twin, recipe, batches(), work_dir=tmp_path / "work")
    with torch.no_grad():
        for x in batches():
            torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=0)
    assert devices(twin) == {"cpu", "meta"}
    for (name, one), (_, other) in zip(
        named_quantizers(plain), named_quantizers(twin), strict=True
    ):
        torch.testing.assert_close(one.state(), other.state(), rtol=0, atol=0, msg=name)


def test_changed_weights_lie_in_the_work_directory(pair: Pair, tmp_path: Path) -> None:
    plain, twin = pair
    bt.quantize(twin, "int8-smoothquant", batches(), work_dir=tmp_path / "work")
    before = plain.state_dict()
    for name, place in places_of(twin).items():
        same = torch.equal(place.load(torch.float32), before[name])
        assert same == (place.path.parent == tmp_path), name
    assert any(place.path.parent != tmp_path for place in places_of(twin).values())


def test_exported_it_is_the_model_in_memory(pair: Pair, tmp_path: Path) -> None:
    plain, twin = pair
    recipe = {"rules": [{"match": "*.up", "weight": "int4"}]}
    for name, model in (("plain", plain), ("twin", twin)):
        bt.quantize(model, recipe, batches())
        bt.export(model, tmp_path / name, format="safetensors")
    files = [next((tmp_path / name).glob("*.safetensors")) for name in ("plain", "twin")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_a_work_directory_nothing_is_changed(pair: Pair) -> None:
    _, twin = pair
    with pytest.raises(CalibrationError, match="lie on the disk"):
        bt.quantize(twin, "int8-smoothquant", batches())
    up = twin.get_submodule("1.0.up")
    with pytest.raises(ModelError, match="block by block"):
        default_toolkit().access(up, write=True).__enter__()


def test_a_failed_calibration_leaves_the_files_that_count(pair: Pair, tmp_path: Path) -> None:
    _, twin = pair
    before = places_of(twin)
    bad = [*batches(), torch.full((4, 32), torch.nan)]
    with pytest.raises(CalibrationError, match="NaN"):
        bt.quantize(twin, "int8-smoothquant", bad, work_dir=tmp_path / "work")
    assert places_of(twin) == before


def test_what_would_need_all_weights_at_once_says_so(pair: Pair, tmp_path: Path) -> None:
    _, twin = pair
    bt.quantize(twin, "int4")
    with pytest.raises(CheckpointError, match="lie on the disk"):
        bt.save(twin, tmp_path / "state")
    bt.compress(twin)
    left = bt.modes_of(twin)[-1].metadata["left"]
    assert left == {
        f"1.{i}.{name}.weight": "it lies on the disk" for i in range(3) for name in ("up", "down")
    }


def test_a_file_that_went_is_named(pair: Pair, tmp_path: Path) -> None:
    _, twin = pair
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1.0.up.weight cannot be read"), torch.no_grad():
        twin(batches()[0])


def test_a_copy_is_a_model_of_its_own(pair: Pair) -> None:
    plain, twin = pair
    twin = copy.deepcopy(twin)
    with torch.no_grad():
        torch.testing.assert_close(twin(batches()[0]), plain(batches()[0]), rtol=0, atol=0)
