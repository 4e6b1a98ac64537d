"""On a GPU: packed weights free memory, move, and compute the bits of rounded ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.nn.packed import PackedWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FORMATS = ("int8", "int4", "int6", "int4-asym", "fp8", "nvfp4", "mxfp4", "mxfp6", "nf4")


def weights(spec: Any) -> dict[str, Any]:
    return {"rules": [{"match": "*", "weight": spec}]}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_keep_their_bits_here_and_after_a_move(name: str) -> None:
    torch.manual_seed(0)
    on_cpu, x = nn.Sequential(nn.Linear(256, 128)), torch.randn(4, 256).cuda()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for model in (on_cpu, on_gpu):
        bt.quantize(model, weights(name))
    with torch.no_grad():
        expected = on_gpu(x)
        for model in (on_cpu, on_gpu):
            bt.compress(model)
        assert torch.equal(on_gpu(x), expected)
        assert torch.equal(on_cpu.cuda()(x), expected)
        assert torch.equal(
            copy.deepcopy(on_gpu).cpu()[0].weight.dequantize().cuda(), on_gpu[0].weight.dequantize()
        )


def test_memory_is_freed() -> None:
    before = torch.cuda.memory_allocated()  # cuBLAS keeps a workspace there
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)]).cuda()
    bt.quantize(model, "nvfp4a16")
    torch.cuda.synchronize()
    bt.compress(model)
    weights = 4 * 2048 * 2048
    assert torch.cuda.memory_allocated() - before < 0.6 * weights + 2**20  # 4.5 bits each, of 32


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_an_lstm_whose_weights_lie_in_one_piece(inputs: str | None) -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(64, 64, 2, bidirectional=True).cuda().eval(), torch.randn(5, 2, 64).cuda()
    bt.quantize(model, {"rules": [{"match": "*", "weight": "int4", "input": inputs}]}, [x])
    with torch.no_grad():
        expected = first(model(x))
        bt.compress(model)
        torch.testing.assert_close(first(model(x)), expected)
        model.cpu().cuda()
        torch.testing.assert_close(first(model(x)), expected)
    assert all(
        p.untyped_storage().nbytes() == p.nbytes
        for p in model.parameters()
        if not isinstance(p, PackedWeight)
    )


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp6"])
def test_compiled_and_in_a_cuda_graph(name: str) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64)).cuda(),
        torch.randn(4, 256).cuda(),
    )
    bt.quantize(model, weights(name))
    bt.compress(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        graph.replay()
        assert torch.equal(found, expected)


def test_gradients_flow_through_packed_weights_in_half_precision() -> None:
    model, x = (
        nn.Sequential(nn.Linear(64, 64)).cuda().bfloat16(),
        torch.randn(4, 64).cuda().bfloat16().requires_grad_(),
    )
    bt.quantize(model, weights("nf4"))
    bt.compress(model)
    model(x).float().square().sum().backward()
    assert x.grad.abs().sum() > 0
