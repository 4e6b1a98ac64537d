"""On a GPU: the bits of the CPU, no host synchronization, and capture in a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.numerics import dequantize, fake_quantize, measure, quantize, scales_for
from bittern.records import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantizerSpec
from bittern.toolkit import Toolkit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FORMATS = Toolkit().registry.formats
GRANULARITIES = (PerTensor(), PerChannel(0), PerToken(), PerGroup(16), PerGroup(32), PerBlock(8, 8))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def specs() -> list[QuantizerSpec]:
    return [
        QuantizerSpec(FORMATS.get(name), granularity)
        for name in FORMATS
        for granularity in (*GRANULARITIES, PerGroup(64))
        if not FORMATS.get(name).block_only or isinstance(granularity, PerGroup | PerBlock)
    ]


def samples(dtype: torch.dtype, *, unsigned: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 200, generator=generator)
    wide = normal * torch.exp2(torch.randint(-30, 14, normal.shape, generator=generator).float())
    ties = (torch.arange(8000) - 4000).reshape(40, 200) / 16
    tiny = normal * torch.finfo(dtype).smallest_normal
    zeros = torch.zeros(40, 200)
    made = [value.to(dtype) for value in (normal, wide, ties, tiny, zeros)]
    return [value.abs() for value in made] if unsigned else made


@pytest.mark.parametrize("spec", specs(), ids=str)
def test_every_format_has_the_bits_of_the_cpu(spec: QuantizerSpec) -> None:
    unsigned = spec.format.name.startswith("uint")
    for dtype in DTYPES:
        for x in samples(dtype, unsigned=unsigned):
            scales = scales_for(measure(x, spec), spec, x)
            expected = fake_quantize(x, spec)
            there = x.cuda()
            assert torch.equal(fake_quantize(there, spec).cpu(), expected)
            packed = quantize(there, spec)
            assert torch.equal(dequantize(packed).cpu(), expected)
            again = scales_for(measure(there, spec), spec, there)
            assert torch.equal(again.step.cpu(), scales.step)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def recipe(**slots: Any) -> dict[str, Any]:
    return {"rules": [{"match": {"class": "Linear"}, **slots}]}


RECIPES = {
    "int8": recipe(weight="int8", input="int8"),
    "int8-asym": recipe(weight="int4-asym", input={"format": "int8-asym", "granularity": "tensor"}),
    "fp8 dynamic": recipe(weight="fp8", input={"format": "fp8", "granularity": "token"}),
    "nvfp4": recipe(weight="nvfp4", input="nvfp4"),
    "mxfp8": recipe(weight="mxfp4", input="mxfp8"),
    "chain": recipe(weight=["int4", {"format": "fp8", "granularity": "tensor"}], input="fp8"),
    "rotated": recipe(
        weight={"format": "int4", "size": 16, "rotate": True},
        input={"format": "int8", "granularity": "token", "rotate": True},
    ),
    "affine": recipe(
        weight="int8", input={"format": "int8", "granularity": "tensor", "affine": {"axes": [-1]}}
    ),
}


def on_gpu(name: str) -> tuple[nn.Module, Tensor]:
    made = model().cuda()
    batches = [torch.randn(16, 64, device="cuda") for _ in range(2)]
    bt.quantize(made, RECIPES[name], data=batches)
    return made, batches[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_forward_pass_can_be_captured_and_replayed(name: str) -> None:
    made, x = on_gpu(name)
    static = x.clone()
    with torch.no_grad():
        for _ in range(2):  # warm up
            made(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(static)
        for seed in range(2):
            fresh = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).cuda()
            static.copy_(fresh)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, made(fresh))


@pytest.mark.parametrize("name", RECIPES)
def test_a_forward_pass_never_waits_for_the_device(name: str) -> None:
    made, x = on_gpu(name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            made(x)
        made(x.requires_grad_()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", RECIPES)
def test_a_quantized_model_moves_to_the_gpu_and_back(name: str) -> None:
    made = model()
    batches = [torch.randn(16, 64) for _ in range(2)]
    bt.quantize(made, RECIPES[name], data=batches)
    expected = made(batches[0])
    moved = copy.deepcopy(made).cuda()
    assert torch.allclose(moved(batches[0].cuda()).cpu(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(moved.cpu()(batches[0]), expected)
