"""The probe of a language model: what is recorded for its client to compute again."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.exporting import ExportRecord
from bittern.exporting.probe import make_probe
from bittern.records import ModelAdapter
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
ToolkitWith = Callable[..., Toolkit]


def test_a_language_model_records_what_it_computes(
    *,
    make_lm: Make,
    token_batches: list[Tensor],
    lm_adapter: ModelAdapter,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
    tmp_path: Path,
) -> None:
    toolkit = toolkit_with(make_plugin("alpha", resolve_model_adapter=lambda: lm_adapter))
    model = make_lm()
    toolkit.quantize(model, "int8", token_batches)
    toolkit.export(model, tmp_path / "out", data=token_batches)
    record = ExportRecord.read(tmp_path / "out")

    assert record is not None
    assert record.probe is not None
    assert record.probe.input_ids == torch.cat(token_batches)[:4].tolist()
    ids = torch.tensor(record.probe.input_ids)
    with torch.no_grad():
        log_p = model(ids).log_softmax(-1)
    expected = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(torch.tensor(record.probe.nll), expected, atol=1e-5)
    assert record.probe.perplexity == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)


ROWS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("data", "own"),
    [
        ([ROWS], True),
        ([{"input_ids": ROWS}], True),
        ([UserDict(input_ids=ROWS)], True),
        ([(ROWS, None)], True),
        ([ROWS[:1], ROWS[1:, :5]], True),
        (None, False),
        (iter([ROWS]), False),
        ([torch.randn(2, 3)], False),
        ([ROWS[:, :1]], False),
        ("a.txt", False),
    ],
    ids=[
        "tensor",
        "dict",
        "userdict",
        "pair",
        "ragged",
        "none",
        "iterator",
        "floats",
        "short",
        "path",
    ],
)
def test_the_probe_takes_rows_of_the_data_or_seeded_ones(
    data: Any, make_lm: Make, lm_adapter: ModelAdapter, *, own: bool
) -> None:
    probe = make_probe(make_lm(), lm_adapter, data)
    seeded = make_probe(make_lm(), lm_adapter, None)

    assert probe is not None
    assert seeded is not None
    assert (probe.input_ids[0] == ROWS[0].tolist()) is own
    assert (probe == seeded) is not own
    assert {len(row) for row in probe.input_ids} == {12 if own else 64}


@pytest.mark.parametrize("adapter", [ModelAdapter(), ModelAdapter(vocab_size=32, causal=False)])
def test_what_is_no_language_model_has_no_probe(adapter: ModelAdapter, make_lm: Make) -> None:
    assert make_probe(make_lm(), adapter) is None
