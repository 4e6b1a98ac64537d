"""The trace of every hand-made model of the zoo, judged by running it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import bittern
from bittern.toolkit import Toolkit
from tracing_zoo import ZOO, Entry
from tracing_zoo.checks import Traced, findings
from tracing_zoo.expected import EXPECTED

FOLDS: dict[str, set[tuple[str, frozenset[str]]]] = {
    "resnet": {(f"{block}.bn1", frozenset({f"{block}.conv2"})) for block in ("block1", "block2")},
    "flattened": {("0", frozenset({"4"}))},
    "decoder": {
        fold
        for i in (0, 1)
        for fold in (
            (f"norm1.{i}", frozenset(f"attention.{i}.{p}" for p in "qkv")),
            (f"norm2.{i}", frozenset({f"mlp.{i}.gate", f"mlp.{i}.up"})),
            (f"mlp.{i}.up", frozenset({f"mlp.{i}.down"})),
            (f"attention.{i}.v", frozenset({f"attention.{i}.o"})),
            ("norm", frozenset({"head"})),
        )
    },
}


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_the_trace_is_physically_true(entry: Entry, toolkit: Toolkit) -> None:
    def tracer(model: nn.Module, inputs: Any) -> Any:
        return bittern.trace(model, inputs, toolkit=toolkit)

    expected = EXPECTED[entry.name]() if entry.name in EXPECTED else None
    found = findings(Traced(entry, tracer), expected=expected, folds=FOLDS.get(entry.name))
    assert not found, "\n".join(found)
