"""Explanations: words about one module or tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import TraceError
from bittern.toolkit import Toolkit
from bittern.tracing import Trace

Make = Callable[..., nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)
        self.list = nn.ModuleList([nn.Linear(4, 6)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(self.gate(h).sigmoid() * self.up(h))
        return torch.cat((x, self.list[0](x)), dim=-1)


@pytest.fixture
def trace(toolkit: Toolkit) -> Trace:
    return toolkit.trace(Net(), torch.randn(2, 4))


def test_a_module(trace: Trace) -> None:
    assert trace.explain("up") == (
        "up: Linear\n"
        "  up.weight [8, 4]\n"
        "    dim 0 = 8\n"
        "      8 coordinates: go together with gate.weight[0], gate.bias[0], up.bias[0], "
        "down.weight[1]\n"
        "    dim 1 = 4\n"
        "      4 coordinates: fixed, because it is a dimension of the model's input\n"
        "  up.bias [8]\n"
        "    dim 0 = 8\n"
        "      8 coordinates: go together with gate.weight[0], gate.bias[0], up.weight[0], "
        "down.weight[1]\n"
        "  reads the same tensor as gate\n"
        "  its input scale can be folded into norm\n"
        "  can take over an input scale of down"
    )


def test_a_parameter(trace: Trace) -> None:
    words = trace.explain("down.weight")
    assert words.startswith("down.weight\n")
    assert "down.bias" not in words
    assert "its input scale can be folded into up" in words


def test_what_did_not_run(trace: Trace) -> None:
    words = trace.explain("unused")
    assert "unused.weight: nobody read it in this run" in words
    assert "not analysed: it did not run with the example inputs" in words


@pytest.mark.parametrize("name", ["", "list"])
def test_what_has_no_tensors_of_its_own(name: str, trace: Trace) -> None:
    assert "it has no tensors of its own" in trace.explain(name)


def test_an_unknown_name_is_answered_with_the_closest(trace: Trace) -> None:
    with pytest.raises(TraceError, match="no module or tensor 'gatee'") as caught:
        trace.explain("gatee")
    assert "closest: gate" in (caught.value.hint or "")


def test_structure_is_spelled_out(toolkit: Toolkit) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(6, 24, bias=False), nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.view(2, 5, 4, 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(mixed.transpose(1, 2).reshape(2, 5, 8))

    words = toolkit.trace(Heads(), torch.randn(2, 5, 6)).explain("qkv")
    assert "dim 0 = 4 x 2 + 4 x 2 + 4 x 2" in words
    assert "4 coordinates of 6 rows: go together with o.weight[1]" in words


def test_long_lists_are_cut(toolkit: Toolkit) -> None:
    layers = [nn.Linear(4, 8), *(nn.Linear(8, 8) for _ in range(12)), nn.Linear(8, 4)]

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            for layer in list(self.layers)[1:-1]:
                x = x + layer(x).tanh()
            return self.layers[-1](x)

    words = toolkit.trace(Stream(), torch.randn(2, 4)).explain("layers.0.weight")
    assert " more" in words
    assert max(map(len, words.splitlines())) < 250


def test_who_normalises_is_said(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    words = toolkit.trace(model, torch.randn(2, 4)).explain("0.bias")
    assert "1 normalises over it" in words


def test_every_name_of_a_model_can_be_explained(make_lm: Make, toolkit: Toolkit) -> None:
    model = make_lm()
    trace = toolkit.trace(model, torch.zeros(1, 5, dtype=torch.int64))
    for name in [*dict(model.named_modules()), *dict(model.named_parameters())]:
        assert trace.explain(name)
