"""What reads one tensor is written with one scale, whatever the architecture calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import bittern as bt
from transformers_zoo import DECODERS

ENTRIES = {entry.name: entry for entry in DECODERS}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_shared_inputs_are_exported_with_one_scale(name: str, tmp_path: Path) -> None:
    made = ENTRIES[name].make()
    model = made.model.float()
    groups = bt.trace(model, made.inputs).shared_inputs
    assert groups
    ids = [dict(made.inputs) for _ in range(2)]
    bt.quantize(model, "int8", ids)
    bt.export(model, tmp_path / "out", verify=False)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for group in groups:
            scales = [file.get_tensor(f"{m}.input_scale") for m in group if m in model_paths(names)]
            assert len(scales) == len(group)
            assert all(torch.equal(scales[0], other) for other in scales)


def model_paths(names: set[str]) -> set[str]:
    return {name.removesuffix(".input_scale") for name in names if name.endswith(".input_scale")}
