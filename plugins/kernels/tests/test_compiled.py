"""The compiled backend computes what core computes, bit for bit, whatever compiles it.

By default torch.compile only captures the graphs here (``backend="eager"``); the tests marked heavy
call the C++ compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bittern
from bittern.errors import NumericsError
from bittern.numerics import Scales, fake_quantize, measure, scales_for
from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)
from bittern_kernels import compiled

TABLE = bittern.Toolkit(block=["*"]).registry.formats
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch):
    """Small tensors are compiled too, and captured only; nothing is left from other tests."""
    monkeypatch.setattr(compiled, "SMALLEST", 1)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "_FUNCTIONS", {})


def spec_of(name: str, granularity: Granularity) -> QuantizerSpec:
    return QuantizerSpec(TABLE.get(name), granularity)


def static(x: Tensor, spec: QuantizerSpec) -> Scales:
    return scales_for(measure(x.nan_to_num(1.0, 1.0, 1.0) * 0.5, spec), spec)


def numbers(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    exponents = torch.randint(-14, 6, (rows, columns), generator=generator).float()
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(exponents)
    x[0] = 0.0
    x[1, :4] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf")])
    return x


def assert_same(x: Tensor, spec: QuantizerSpec, scales: Scales | None) -> None:
    before = x.clone()
    found, wanted = compiled.fake_quantize(x, spec, scales), fake_quantize(x, spec, scales)
    assert found is not None
    nan = wanted.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(BITS[x.dtype])[~nan], wanted.view(BITS[x.dtype])[~nan])
    assert torch.equal(x.view(BITS[x.dtype]), before.view(BITS[x.dtype]))


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("fp8", PerTensor()),
        ("int8", PerChannel(0)),
        ("int4-asym", PerToken()),
        ("int4", PerGroup(16)),
    ],
    ids=str,
)
def test_rows_have_the_scales_of_the_tensor(name, granularity):
    spec = spec_of(name, granularity)
    x = numbers(9, 48).bfloat16()
    assert_same(x, spec, static(x, spec))
    assert_same(x, spec, None)


def test_any_number_of_rows_is_one_graph(monkeypatch):
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", keep)
    for granularity in (PerTensor(), PerToken()):
        spec = spec_of("int8", granularity)
        graphs.clear()
        for rows in (3, 7, 500):
            x = numbers(rows, 48)
            assert_same(x, spec, static(x, spec))
        assert len(graphs) == 1


def test_many_kinds_of_rows_are_all_compiled():
    spec = spec_of("int8", PerToken())
    for columns in range(5, 15):  # torch.compile gives up at 8 versions of one function
        x = numbers(4, columns)
        assert_same(x, spec, static(x, spec))
    assert len(compiled._FUNCTIONS) == 10


def test_declined():
    x = torch.randn(32, 40)
    spec = spec_of("int8", PerTensor())
    declined = {
        "empty": (torch.empty(0, 4), spec, None),
        "another axis": (x, spec_of("int8", PerChannel(1)), None),
        "partial groups": (x, spec_of("int4", PerGroup(16)), None),
        "groups along another axis": (x, spec_of("int4", PerGroup(16, axis=0)), None),
        "blocks": (x, spec_of("int8", PerBlock(8, 8)), None),
        "scales of a wrong shape": (x, spec, Scales(torch.ones(32, 1))),
        "a learned scale": (x, spec, Scales(torch.ones((), requires_grad=True))),
        "an input with a gradient": (x.clone().requires_grad_(), spec, None),
        "an unsigned format": (x, spec_of("uint8", PerTensor()), None),
        "another order of memory": (x.t(), spec, None),
    }
    for why, arguments in declined.items():
        assert compiled.fake_quantize(*arguments) is None, why
    with torch.no_grad():
        assert compiled.fake_quantize(x.clone().requires_grad_(), spec, None) is not None


def test_small_tensors_are_left_to_core(monkeypatch):
    monkeypatch.undo()
    assert compiled.fake_quantize(torch.ones(64, 64), spec_of("int8", PerToken()), None) is None


def test_a_model_that_is_compiled_as_a_whole_gets_core():
    spec, x = spec_of("int8", PerToken()), numbers(6, 48)

    def run(x: Tensor) -> Tensor:
        assert compiled.fake_quantize(x, spec, None) is None
        return fake_quantize(x, spec)

    found = torch.compile(run, backend="eager", fullgraph=True)(x)
    assert torch.equal(found.nan_to_num(7.0), fake_quantize(x, spec).nan_to_num(7.0))


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch):
    def broken(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        raise RuntimeError("no c++ here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with pytest.raises(NumericsError, match=r"(?s)no c\+\+ here.*leave the backend out"):
        compiled.fake_quantize(numbers(4, 8), spec_of("int8", PerTensor()), None)


def test_a_recipe_names_the_backend():
    data = [torch.randn(8, 64)]
    outputs = []
    for named in ({}, {"backend": "compile"}):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
        slot = {"format": "int8", **named}
        recipe = {"rules": [{"match": {"class": "Linear"}, "weight": slot, "input": slot}]}
        bittern.Toolkit(plugins=["kernels"]).quantize(model, recipe, data)
        with torch.no_grad():
            outputs.append(model(data[0]))
        assert bool(compiled._FUNCTIONS) == bool(named)
    assert torch.equal(*outputs)


@pytest.mark.heavy
@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int8", "int4", "int8-asym", "fp8", "fp8-e5m2"])
def test_the_c_compiler_keeps_every_bit(name, dtype, granularity, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    spec = spec_of(name, granularity)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32)
    wide = (numbers(67, 48), every.view(-1, 64), patterns.view(torch.float32).view(-1, 64))
    for x in (values.to(dtype) for values in wide):
        assert_same(x, spec, static(x, spec))
        finite = x.nan_to_num(0.0, 1.0, -1.0)
        assert_same(finite, spec, None)
