"""Inputs that are one tensor get one range, also where not every module saw every batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.calibration.max import run_max
from bittern.nn import named_quantizers
from bittern.nn.observer import SharedInputs
from bittern.toolkit import Toolkit


class Branches(nn.Module):
    """Reads one tensor with two linears; the second sits out small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x) + self.c(x.tanh())
        return out + self.b(x) if len(x) > 1 else out


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(3, 4, generator=generator), torch.randn(1, 4, generator=generator)
    return [large, 50 * small]


def ranges(model: nn.Module) -> dict[str, float]:
    found = {n: q.amax for n, q in named_quantizers(model) if n.endswith(".input")}
    return {name.partition(".")[0]: float(v) for name, v in found.items() if v is not None}


def test_the_range_is_the_largest_of_all(toolkit: Toolkit) -> None:
    model, data = Branches().eval(), batches()
    toolkit.quantize(model, "int8", data)
    found = ranges(model)
    assert found["a"] == found["b"] == float(data[1].abs().max())
    assert found["c"] <= 1


def test_other_formats_keep_their_own(toolkit: Toolkit) -> None:
    model, data = Branches().eval(), batches()
    recipe = {"extends": "int8", "rules": [{"match": "b", "input": "fp8"}]}
    toolkit.quantize(model, recipe, data)
    found = ranges(model)
    assert found["a"] == float(data[1].abs().max())
    assert found["b"] == float(data[0].abs().max())


@pytest.mark.parametrize(
    "as_data",
    [lambda data: lambda model: [model(x) for x in data], iter],
    ids=["function", "iterator"],
)
def test_without_a_trace_everybody_keeps_what_it_saw(
    as_data: Callable[[list[Tensor]], Any], toolkit: Toolkit
) -> None:
    model, data = Branches().eval(), batches()
    toolkit.quantize(model, "int8", as_data(data))
    found = ranges(model)
    assert found["a"] == float(data[1].abs().max())
    assert found["b"] == float(data[0].abs().max())


NVFP4 = {"rules": [{"match": {"class": "Linear"}, "weight": "nvfp4", "input": "nvfp4"}]}


class Projections(nn.Module):
    """Three linears read one tensor; a fourth reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        with torch.no_grad():
            self.k.weight.mul_(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x) * self.v(x))


def globals_of(model: nn.Module, slot: str) -> dict[str, float]:
    return {
        name.partition(".")[0]: float(quantizer.global_amax)
        for name, quantizer in named_quantizers(model)
        if name.endswith(slot) and quantizer.global_amax is not None
    }


def test_weights_that_read_one_tensor_share_the_largest_global_scale(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = Projections().eval()
    own = {name: float(getattr(model, name).weight.abs().max()) for name in "qkvo"}
    toolkit.quantize(model, NVFP4, [torch.randn(4, 32)])
    assert globals_of(model, ".weight") == {**dict.fromkeys("qkv", own["k"]), "o": own["o"]}
    inputs = globals_of(model, ".input")
    assert inputs["q"] == inputs["k"] == inputs["v"] != inputs["o"]


def test_sharing_can_be_switched_off(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = Projections().eval()
    own = {name: float(getattr(model, name).weight.abs().max()) for name in "qkvo"}
    recipe = {**NVFP4, "algorithm": {"max": {"share": False}}}
    toolkit.quantize(model, recipe, [torch.randn(4, 32)])
    assert globals_of(model, ".weight") == own


def test_the_model_is_traced_only_where_ranges_can_differ(toolkit: Toolkit) -> None:
    model, data = Branches().eval(), batches()
    plan = toolkit.plan(model, "int8")
    toolkit.convert(model, plan)
    traced: list[int] = []

    def used(some: list[Tensor]) -> bool:
        traced.clear()
        access: Any = lambda module, *, write: nullcontext()  # noqa: E731
        context = CalibrationContext(
            shared=(shared := SharedInputs()), access=access, trace=lambda: traced.append(1)
        )

        def forward() -> int:
            for shared.batch, x in enumerate(some):
                model(x)
            return len(some)

        run_max(model, plan, forward, context)
        return bool(traced)

    assert not used(data[:1])  # all of them saw all
    found = ranges(model)
    assert found["a"] == found["b"]
    assert used(data)
