"""The trace as plain data and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bittern.toolkit import Toolkit
from bittern.tracing import Trace

Make = Callable[..., nn.Module]


@pytest.fixture
def trace(make_lm: Make, toolkit: Toolkit) -> Trace:
    return toolkit.trace(make_lm(depth=1), torch.zeros(1, 5, dtype=torch.int64))


def test_data_says_what_the_trace_says_and_survives_json(trace: Trace) -> None:
    found = json.loads(json.dumps(trace.to_dict()))
    assert set(found) == {"groups", "shared_inputs", "foldable", "coverage"}
    assert [g["size"] for g in found["groups"]] == [g.size for g in trace.groups]
    for group, plain in zip(trace.groups, found["groups"], strict=True):
        assert [m["index"] for m in plain["members"]] == [m.index.tolist() for m in group.members]
        assert plain["normalized_by"] == list(group.normalized_by)
    assert found["shared_inputs"] == [["layers.0.q", "layers.0.k", "layers.0.v"]]
    assert {f["producer"] for f in found["foldable"]} == {f.producer for f in trace.foldable}
    assert found["coverage"]["fraction"] == 1
    assert found["coverage"]["barriers"] == {}


def test_the_same_model_gives_the_same_data(make_lm: Make, toolkit: Toolkit) -> None:
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    one, two = (toolkit.trace(make_lm(), tokens) for _ in range(2))
    assert json.dumps(one.to_dict()) == json.dumps(two.to_dict())
    assert one.to_dot() == two.to_dot()


def test_dot_has_an_edge_for_everything_that_was_found(trace: Trace) -> None:
    dot = trace.to_dot()
    assert dot.startswith("digraph trace {\n")
    assert dot.endswith("}\n")
    for reader in "qkv":
        assert f'"input 0" -> "layers.0.{reader}";' in dot
    for fold in trace.foldable:
        for consumer in fold.consumers:
            assert f'"{fold.producer}" -> "{consumer}" [style=dashed, label="fold"];' in dot
    ends = set(re.findall(r'"([^"]+)" ->', dot)) | set(re.findall(r'-> "([^"]+)"', dot))
    declared = set(re.findall(r'^  "([^"]+)"(?: \[|;)', dot, re.MULTILINE))
    assert ends <= declared


def test_dot_quotes_names(toolkit: Toolkit) -> None:
    model = nn.Sequential()
    model.add_module('say "a"', nn.Linear(4, 8))
    model.add_module("back\\slash", nn.Linear(8, 4))
    dot = toolkit.trace(model, torch.randn(2, 4)).to_dot()
    assert r'"say \"a\"" -> "back\\slash"' in dot


def test_a_trace_that_found_nothing(toolkit: Toolkit) -> None:
    trace = toolkit.trace(nn.Sequential(nn.ReLU()), torch.randn(2, 4))
    assert trace.to_dict() == {
        "groups": [],
        "shared_inputs": [],
        "foldable": [],
        "coverage": {"analysed": [], "barriers": {}, "fraction": 1.0},
    }
    assert "->" not in trace.to_dot()
