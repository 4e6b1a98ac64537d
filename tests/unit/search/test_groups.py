"""Who chooses together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.records import ModelAdapter
from bittern.runtime import prepare
from bittern.search.candidates import plan_candidates
from bittern.search.groups import DecisionGroup, find_groups, group_modules
from bittern.toolkit import Toolkit

INT8 = {"rules": [{"match": {"class": ["Linear", "Embedding"]}, "weight": "int8"}], "strict": False}


def groups_of(
    toolkit: Toolkit, model: nn.Module, data: Any, **options: Any
) -> tuple[list[str], tuple[str, ...]]:
    every = plan_candidates(model, {"int8": INT8}, toolkit)
    batch = prepare(data, model, ModelAdapter(), index=0)
    groups, notes = find_groups(model, every, every.modules, batch=batch, steps=toolkit, **options)
    return [group.name for group in groups], notes


class GatedMlp(nn.Module):
    """Names that no table would know."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(x, (8,))
        return self.gamma(torch.sigmoid(self.alpha(x)) * self.beta(x))


def test_what_reads_one_tensor_chooses_together_whatever_it_is_called(toolkit: Toolkit) -> None:
    names, notes = groups_of(toolkit, GatedMlp(), torch.randn(2, 8))
    assert names == ["{alpha,beta}", "gamma"]
    assert not notes


def test_attention_projections_choose_together_layer_by_layer(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    names, _ = groups_of(toolkit, make_lm(), token_batches[0])
    assert names == [
        "embed",
        "layers.0.{q,k,v}",
        "layers.0.o",
        "layers.1.{q,k,v}",
        "layers.1.o",
        "head",
    ]


def test_what_holds_one_parameter_chooses_together(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    names, _ = groups_of(toolkit, make_lm(tied=True), token_batches[0])
    assert names[0] == "{embed,head}"


def test_what_is_within_another_chooses_with_it(toolkit: Toolkit) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    kinds = {"match": {"class": ["Linear", "MultiheadAttention"]}, "weight": "int8"}
    result = toolkit.auto_quantize(
        layer, {"int8": {"rules": [kinds]}}, [torch.randn(2, 5, 16)], bits=16, points=2
    )
    assert [d.name for d in result.decisions] == [
        "{self_attn,self_attn.out_proj}",
        "linear1",
        "linear2",
    ]
    assert not result.unreached


def test_without_a_trace_every_module_chooses_alone_and_it_is_said(toolkit: Toolkit) -> None:
    class Stubborn(GatedMlp):
        def forward(self, x: Tensor) -> Tensor:
            if type(x) is not Tensor or torch.compiler.is_compiling():
                raise RuntimeError("real tensors only")
            raise RuntimeError("or none at all")

    names, notes = groups_of(toolkit, Stubborn(), torch.randn(2, 8))
    assert names == ["alpha", "beta", "gamma"]
    assert "every module chooses alone" in notes[0]


def test_experts_choose_together_layer_by_layer_where_that_is_wanted(toolkit: Toolkit) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            parts = x.split(2)
            return torch.cat([e(part) for e, part in zip(self.experts, parts, strict=True)])

    model = nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Linear(8, 8))
    data = torch.randn(6, 8)
    alone, _ = groups_of(toolkit, model, data)
    together, _ = groups_of(toolkit, model, data, patterns=["*.experts.*"])
    assert len(alone) == 7
    assert together == ["0.0.experts.{0,1,2}", "0.1.experts.{0,1,2}", "1"]


@pytest.mark.parametrize(
    ("together", "wanted"),
    [
        ([], ["a", "b", "c", "d"]),
        ([("a", "c")], ["a+c", "b", "d"]),
        ([("a", "b"), ("c", "b")], ["a+b+c", "d"]),
        ([("c", "d"), ("a", "b"), ("d", "a")], ["a+b+c+d"]),
        ([("b.weight", "c.weight"), ("unknown", "d")], ["a", "b+c", "d"]),
    ],
)
def test_sets_that_overlap_become_one(together: list[tuple[str, ...]], wanted: list[str]) -> None:
    groups = group_modules(["a", "b", "c", "d"], together)
    assert ["+".join(group.members) for group in groups] == wanted


@pytest.mark.parametrize(
    ("members", "name"),
    [
        (("a.b.q", "a.b.k"), "a.b.{q,k}"),
        (("a.0.q", "a.1.q"), "a.{0.q,1.q}"),
        (("x",), "x"),
        (("x", "x.y"), "{x,x.y}"),
        (("q", "k"), "{q,k}"),
    ],
)
def test_a_group_has_a_short_name(members: tuple[str, ...], name: str) -> None:
    assert DecisionGroup(members).name == name
