"""The whole way: a model of the framework, quantized, exported, and served by its engine."""

from __future__ import annotations

from pathlib import Path

import bittern as bt
import pytest
import torch

from bittern_heron.export import engine_name
from heron_framework.engine import load
from heron_framework.model import Encoder


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("blocks.0.attention.query.weight", "layers.0.attn.q.weight"),
        ("blocks.1.attention.out.weight.scale", "layers.1.attn.o.weight.scale"),
        ("blocks.0.up.bias", "layers.0.up.bias"),
        ("keynote.weight", "keynote.weight"),
    ],
)
def test_names_are_the_engines(ours: str, theirs: str) -> None:
    assert engine_name(ours) == theirs


def test_a_model_is_served_as_it_was_simulated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder(width=16, heads=2, depth=2).eval()
    x = torch.randn(2, 6, 16)
    original = model(x)
    toolkit = bt.Toolkit(plugins=["heron"])
    result = bt.quantize(model, "heron-int8", data=[x], toolkit=toolkit)

    assert {entry.plugin for entry in result.plan.entries} == {"bittern-heron 0.1.0"}
    assert len(result.plan.modules) == 2 * (6 + 1)  # six linear layers and one product per block
    signal = (original - model(x)).norm() / original.norm()
    assert signal < 0.05

    bt.export(model, tmp_path / "out", format="heron", toolkit=toolkit)
    weights = load(tmp_path / "out")
    assert "layers.1.attn.q.weight" in weights
    layer = model.blocks[1].attention.query
    torch.testing.assert_close(
        weights["layers.1.attn.q.weight"], layer.quantize("weight", layer.weight), rtol=0, atol=0
    )
