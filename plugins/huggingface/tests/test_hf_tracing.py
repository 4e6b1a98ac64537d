"""The traces of tiny transformers models, judged by running them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import bittern
from tracing_zoo import Entry
from tracing_zoo.checks import Traced, findings
from tracing_zoo.physics import SAME, Subject, forgotten, permutation_error
from tracing_zoo.removal import remove
from tracing_zoo.truths import fold_error
from transformers_zoo import DECODERS, ZOO
from transformers_zoo.expected import EXPECTED, FOLDS

ENTRIES = {entry.name: entry for entry in ZOO}
FIXED = frozenset({37, 7, 8, 32, 34})  # the vocabulary, experts, positions


@dataclass(frozen=True)
class Scale:
    """A fold, as the trace has them."""

    producer: str
    consumers: tuple[str, ...]
    tensor: str = "weight"
    dim: int = 0


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_the_trace_is_physically_true(entry: Entry) -> None:
    expected = EXPECTED[entry.name]() if entry.name in EXPECTED else None
    folds = FOLDS[entry.name]() if entry.name in FOLDS else None
    fixed = FIXED if entry in DECODERS else None
    traced = Traced(entry, bittern.trace)
    found = findings(traced, expected=expected, folds=folds, fixed=fixed)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_expected_is_true_itself(name: str) -> None:
    example = ENTRIES[name].make()
    subject, groups = Subject(example.model, example.inputs, example.others), EXPECTED[name]()
    for group in groups:
        assert permutation_error(subject, group) < SAME
        assert not forgotten(subject, group)
        removal = remove(subject, group, among=groups)
        assert removal.error is None or removal.error < SAME
    for producer, consumers in FOLDS[name]() if name in FOLDS else ():
        assert fold_error(subject, Scale(producer, tuple(consumers))) < SAME
