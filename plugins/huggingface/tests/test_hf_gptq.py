"""GPTQ of fused experts: a Gram matrix of the rows that each of them got."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_hf_experts import COUNT, Layer, gpt_oss, mixtral, nemotron, routed
from torch import Tensor, nn

import bittern as bt
from bittern.calibration.context import CalibrationContext
from bittern.calibration.gram import observe_grams
from bittern.nn.observer import SharedInputs

RECIPE: dict[str, Any] = {
    "rules": [{"match": "experts", "weight": {"format": "int4", "granularity": "channel"}}],
    "algorithm": "gptq",
}


def batches(reached: int = COUNT) -> list[dict[str, Tensor]]:
    given = (routed(seed, reached=reached) for seed in range(4))
    return [{"tokens": t, "index": i, "weights": w} for t, i, w in given]


def error(layer: nn.Module, plain: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((layer(**b) - plain(**b)).square().sum()) for b in batches())


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_an_expert_has_the_sums_over_its_own_tokens(make: Any) -> None:
    layer, data = Layer(make()).eval(), batches()
    plan = bt.quantize(layer, {**RECIPE, "algorithm": "max"}).plan

    def forward() -> int:
        for batch in data:
            layer(**batch)
        return len(data)

    context = CalibrationContext(
        shared=SharedInputs(), access=lambda module, *, write: nullcontext()
    )
    found = observe_grams(layer, plan, forward, context)
    assert set(found) == {"experts.gate_up_proj", "experts.down_proj"}
    gram = found["experts.gate_up_proj"]
    for expert in range(COUNT):
        rows = torch.cat([b["tokens"][(b["index"] == expert).any(1)] for b in data])
        torch.testing.assert_close(gram.matrix[expert], rows.t() @ rows, rtol=1e-4, atol=1e-4)
        assert gram.tokens[expert] == len(rows)
    assert gram.layout.transposed == (make is gpt_oss)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_come_closer_than_by_rounding_to_nearest(make: Any) -> None:
    plain, nearest, layer = (Layer(make()).eval() for _ in range(3))
    bt.quantize(nearest, {**RECIPE, "algorithm": "mse"})
    bt.quantize(layer, RECIPE, batches())
    assert error(layer, plain) < 0.9 * error(nearest, plain)
    for name in ("gate_up_proj", "down_proj"):
        weight = layer.experts.get_parameter(name)
        assert torch.equal(layer.experts.quantizer(name)(weight), weight)


def test_an_expert_without_tokens_is_rounded_to_nearest() -> None:
    layer, plain = Layer(mixtral()).eval(), Layer(mixtral()).eval()
    bt.quantize(layer, RECIPE, batches(reached=2))
    quantizer = layer.experts.quantizer("gate_up_proj")
    weight = plain.experts.gate_up_proj.detach()
    assert torch.equal(layer.experts.gate_up_proj[2:], quantizer(weight)[2:])
    assert not torch.equal(layer.experts.gate_up_proj[:2], quantizer(weight)[:2])


def test_products_with_gathered_copies_of_weights_are_said_not_to_be_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = Layer(nemotron()).eval()
    with caplog.at_level(logging.WARNING, "bittern.calibration"):
        bt.quantize(layer, RECIPE, batches())
    assert "experts.up_proj is rounded to nearest" in caplog.text
