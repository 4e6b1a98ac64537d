"""States that earlier versions wrote are restored: one of every schema lies in data/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bittern as bt
from bittern.checkpoint.manifest import Manifest
from bittern.checkpoint.migrations import SCHEMA

DATA = Path(__file__).parent / "data"
SCHEMAS = sorted(DATA.glob("schema-*"))


def test_there_is_a_state_of_every_schema() -> None:
    found = [json.loads((path / "manifest.json").read_text())["schema"] for path in SCHEMAS]
    assert found == list(range(1, SCHEMA + 1))


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_state_of_any_schema_computes_what_it_did(path: Path) -> None:
    first, tied = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    tied.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), tied, nn.ReLU(), nn.Linear(16, 4))
    bt.restore(model, path)
    expected = load_file(path / "expected.safetensors")
    # not bit for bit: another processor sums the products of a matrix in another order
    torch.testing.assert_close(model(expected["input"]), expected["output"], rtol=1e-5, atol=1e-6)
    assert tied.weight is first.weight
    assert [mode.name for mode in bt.modes_of(model)] == ["quantize"]
    assert bt.modes_of(model)[0].config["recipe"] == "int8"


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_what_was_restored_is_saved_in_the_schema_of_today(path: Path, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(16, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    bt.restore(model, path)
    bt.save(model, tmp_path / "state")
    again = Manifest.read(tmp_path / "state")
    assert again.schema == SCHEMA
    assert len(again.modes[0].metadata["entries"]) == 6
