"""Records and errors: frozen, light, plain data where they say so."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest

from bittern import errors, records
from bittern.errors import BitternError, PluginConflictError, PluginError
from bittern.records import (
    Affine,
    ExportReport,
    NumberFormat,
    PerChannel,
    PerTensor,
    PerToken,
    Plan,
    PlanEntry,
    QuantizerSpec,
    Slot,
)

CLASSES = [value for name in records.__all__ if isinstance(value := getattr(records, name), type)]
INT8 = NumberFormat(name="int8", bits=8, codec="a:b")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_record_is_a_frozen_documented_dataclass(cls: Any) -> None:
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # the one that dataclass makes up


def test_every_hook_that_returns_records_names_one() -> None:
    from bittern.hooks.specs import RETURNS

    assert set(RETURNS.values()) <= set(records.__all__)


def entry(module: str = "a.b", slot: str = "weight", **options: Any) -> PlanEntry:
    given: dict[str, Any] = {
        "spec": QuantizerSpec(INT8, PerChannel(0)),
        "rule": "t:L",
        "plugin": "p",
        "kind": "weight",
        "slot_rule": Slot("weight", kind="weight", tensor="weight"),
        "shape": (4, 8),
        **options,
    }
    return PlanEntry(module=module, slot=slot, **given)


def test_an_entry_knows_its_names() -> None:
    weight = entry()
    assert (weight.path, weight.parameter, weight.tensor) == ("a.b.weight", "a.b.weight", "weight")
    assert (weight.format, weight.granularity) == ("int8", PerChannel(0))

    root = entry("", "q", slot_rule=Slot("q", kind="weight", tensor="q_proj"))
    assert (root.path, root.parameter, root.tensor) == ("q", "q_proj", "q_proj")

    nameless = entry(slot="w", slot_rule=Slot("w", kind="weight"))
    assert (nameless.tensor, nameless.parameter) == ("w", "a.b.w")

    activation = entry(slot="input", kind="activation", slot_rule=Slot("input"), shape=None)
    assert (activation.path, activation.parameter, activation.tensor) == ("a.b.input", None, None)


def test_a_plan_groups_its_entries() -> None:
    plan = Plan(
        recipe="r",
        skipped={},
        entries=(
            entry("x", "weight"),
            entry("y", "weight"),
            entry("x", "input", kind="activation", slot_rule=Slot("input"), shape=None),
        ),
    )

    assert plan.modules == ("x", "y")
    assert {m: list(slots) for m, slots in plan.by_module().items()} == {
        "x": ["weight", "input"],
        "y": ["weight"],
    }
    assert plan.needs_data
    assert plan.effective_bits == 8 + 32 / 8  # one scale per row of eight


@pytest.mark.parametrize(
    ("kind", "dynamic", "needs"),
    [("activation", False, True), ("activation", True, False), ("weight", False, False)],
)
def test_only_static_activations_need_data(kind: str, *, dynamic: bool, needs: bool) -> None:
    spec = QuantizerSpec(INT8, PerTensor(), dynamic)
    plan = Plan(recipe="r", skipped={}, entries=(entry(kind=kind, spec=spec),))

    assert plan.needs_data is needs


def test_scales_and_biases_are_counted_once_along_each_axis() -> None:
    def bits(axes: tuple[int, ...], affine: Affine | None = None) -> float:
        return QuantizerSpec(INT8, PerChannel(axes), affine=affine).bits_per_element((4, 16))

    assert bits((0,)) == bits((0, 0)) == bits((0, -2)) == 8 + 4 * 32 / 64
    assert bits((0,), Affine(axes=(-1,))) == bits((0,)) + 16 * 32 / 64


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"weight_granularity": "channel"}, "weight_granularity must be as PerChannel"),
        ({"input_granularity": PerToken}, "input_granularity must be as PerChannel"),
    ],
)
def test_a_format_says_what_is_wrong_with_it(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=problem):
        NumberFormat(**{"name": "x", "bits": 8, "codec": "a:b", **wrong})


def test_an_empty_plan_has_no_bits() -> None:
    assert Plan(recipe="r", entries=(), skipped={}).effective_bits == 0


def test_an_export_report_sums_its_files() -> None:
    assert ExportReport(path="p", format="f", files={"a": 3, "b": 4}).bytes == 7


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_one_of_ours_and_documented(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, BitternError)
    assert cls.__doc__


@pytest.mark.parametrize(
    ("where", "hint", "text"),
    [
        (None, None, "it broke"),
        ("a.b", None, "a.b: it broke"),
        (None, "mend it", "it broke\n  hint: mend it"),
        ("a.b", "mend it", "a.b: it broke\n  hint: mend it"),
    ],
)
def test_an_error_says_where_what_and_what_to_do(
    where: str | None, hint: str | None, text: str
) -> None:
    error = PluginConflictError("it broke", where=where, hint=hint)

    assert str(error) == text
    assert isinstance(error, PluginError)
    assert json.loads(json.dumps(error.to_dict())) == {
        "error": "PluginConflictError",
        "what": "it broke",
        "where": where,
        "hint": hint,
    }
    copied = pickle.loads(pickle.dumps(error))  # data loader workers hand them over so
    assert str(copied) == text
