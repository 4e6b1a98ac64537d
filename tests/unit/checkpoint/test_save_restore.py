"""Saving a quantized model and restoring it into a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bittern as bt
from bittern.errors import CheckpointError, OutputError, PlanError

BUILD = """
import torch
from torch import nn

def build(seed):
    torch.manual_seed(seed)
    last = nn.Linear(32, 16, bias=False)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), last, nn.LayerNorm(16))
"""
space: dict[str, Any] = {}
exec(BUILD, space)
build: Callable[[int], nn.Sequential] = space["build"]
RECIPES = ["int8", "int8-weight-only", "fp8", "fp8-dynamic"]


def inputs() -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(3))


def saved(path: Path, recipe: str = "int8") -> nn.Sequential:
    model = build(0)
    bt.quantize(model, recipe, data=[inputs()])
    bt.save(model, path)
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fresh_process_gets_the_same_bits(recipe: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "state", recipe)
    torch.save(model(inputs()).detach(), tmp_path / "expected.pt")
    code = (
        BUILD
        + f"""
import bittern as bt
model = build(99)
bt.restore(model, {str(tmp_path / "state")!r})
x = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert torch.equal(model(x), expected)
"""
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict(
            {"embed": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    bt.quantize(model, "int8-weight-only")
    bt.save(model, tmp_path / "state")
    names = set(load_file(tmp_path / "state" / "state.safetensors"))
    assert len(names & {"embed.weight", "head.weight"}) == 1
    other = tied()
    bt.restore(other, tmp_path / "state")
    assert other["head"].weight is other["embed"].weight
    assert torch.equal(other["head"].weight, model["head"].weight)


def test_the_files_hold_no_pickle(tmp_path: Path) -> None:
    saved(tmp_path / "state")
    assert {f.name for f in (tmp_path / "state").iterdir()} == {
        "manifest.json",
        "state.safetensors",
    }
    manifest = json.loads((tmp_path / "state" / "manifest.json").read_text())
    assert [mode["name"] for mode in manifest["modes"]] == ["quantize"]
    assert manifest["modes"][0]["config"]["recipe"] == "int8"


def test_a_plain_model_has_no_state_to_save(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not quantized"):
        bt.save(build(0), tmp_path / "state")


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    model = build(0)
    bt.quantize(model, "int8-weight-only")
    with pytest.raises(OutputError):
        bt.save(model, tmp_path)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    del data["checksum"]
    change(data)
    file.write_text(json.dumps(data))


def edit_entry(path: Path, **changes: Any) -> None:
    edit(path, lambda d: d["modes"][0]["metadata"]["entries"][0].update(changes))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path / "state.safetensors")
    del tensors["2.weight"]
    save_file(tensors, path / "state.safetensors")
    edit(path, lambda d: d.pop("checksums"))


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest"),
    "manifest is no JSON": (lambda p: (p / "manifest.json").write_text("{"), "not JSON"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]"), "malformed"),
    "modes malformed": (lambda p: edit(p, lambda d: d.update(modes=[1])), "malformed"),
    "entries malformed": (
        lambda p: edit(p, lambda d: d["modes"][0]["metadata"].update(entries=[1])),
        "malformed",
    ),
    "unknown mode": (lambda p: edit(p, lambda d: d["modes"][0].update(name="x")), "mode 'x'"),
    "unknown option": (
        lambda p: edit(p, lambda d: d["modes"][0]["config"].update(more=1)),
        "no option 'more'",
    ),
    "unknown key": (lambda p: edit(p, lambda d: d.update(more=1)), "malformed"),
    "newer schema": (lambda p: edit(p, lambda d: d.update(schema=99)), "newer"),
    "unknown format": (lambda p: edit_entry(p, spec={"format": "x"}), "format"),
    "unknown slot": (lambda p: edit_entry(p, slot="q"), "no loaded"),
    "truncated tensors": (
        lambda p: (p / "state.safetensors").write_bytes(b"\x10" * 20),
        "cannot be read",
    ),
    "a bit flipped": (flip_a_bit, "changed since it was saved"),
    "a tensor gone": (drop_tensor, r"2\.weight is missing"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_one_clear_error_and_leaves_the_model_as_it_was(
    damage: str, tmp_path: Path
) -> None:
    inflict, message = DAMAGE[damage]
    saved(tmp_path / "state")
    inflict(tmp_path / "state")
    model = build(5)
    before = model(inputs())
    with pytest.raises(CheckpointError, match=message):
        bt.restore(model, tmp_path / "state")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(inputs()), before)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"another model|does not have"):
        bt.restore(nn.Sequential(nn.Linear(16, 16)), tmp_path / "state")


# --- tensors of other kinds than a weight of its own ----------------------------------------------


class Windows(nn.Module):
    """Buffers that overlap in one piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        both = torch.randn(32)
        self.register_buffer("both", both)
        self.register_buffer("last", both[16:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) + self.both[:16] * self.last


def test_buffers_that_overlap_are_saved(tmp_path: Path) -> None:
    model, fresh = Windows(), Windows()
    bt.quantize(model, "int8", data=[inputs()])
    bt.save(model, tmp_path / "state")
    bt.restore(fresh, tmp_path / "state")
    assert torch.equal(fresh(inputs()), model(inputs()))
    assert fresh.last.data_ptr() == fresh.both[16:].data_ptr()


class Counting(nn.Linear):
    """Keeps something in its state_dict that is no tensor."""

    count = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_what_is_no_tensor_is_refused_and_not_lost(tmp_path: Path) -> None:
    model = nn.Sequential(Counting(16, 16))
    bt.quantize(model, "int8-weight-only")
    with pytest.raises(CheckpointError, match=r"0\._extra_state is a dict"):
        bt.save(model, tmp_path / "state")
    assert not (tmp_path / "state").exists()
    bt.save(model, tmp_path / "state", state_only=True)


def pair(*, tied: bool) -> nn.Sequential:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    if tied:
        second.weight = first.weight
    return nn.Sequential(first, second)


def test_two_weights_are_not_loaded_into_one(tmp_path: Path) -> None:
    model, fresh = pair(tied=False), pair(tied=True)
    bt.quantize(model, "int8-weight-only")
    bt.save(model, tmp_path / "state")
    before = fresh(inputs())
    with pytest.raises(CheckpointError, match=r"1\.weight and 0\.weight are one tensor here"):
        bt.restore(fresh, tmp_path / "state")
    assert torch.equal(fresh(inputs()), before)


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "state")
    with torch.device("meta"):
        fresh = build(1)
    with pytest.raises(CheckpointError, match=r"0\.weight is on the meta device"):
        bt.restore(fresh, tmp_path / "state")
