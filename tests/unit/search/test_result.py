"""What a search says: tables, JSON, a picture, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from torch import Tensor, nn

from bittern.config import SpecModel
from bittern.planning.specs import resolve_spec
from bittern.records import Slot
from bittern.search import SearchResult
from bittern.search.candidates import plan_candidates
from bittern.search.console import show_search
from bittern.search.rules import recipe_of, slots_data
from bittern.toolkit import Toolkit


@pytest.fixture
def result(toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]) -> SearchResult:
    found = toolkit.auto_quantize(
        make_mlp(), ["int4", "int8"], batches, bits=14, method="layer", points=9, apply=False
    )
    assert isinstance(found, SearchResult)
    return found


def test_json_holds_the_front_the_groups_and_the_recipe(
    result: SearchResult, tmp_path: Path
) -> None:
    result.to_json(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["chosen"] in data["front"]
    assert data["recipe"] == result.recipe()
    assert [group["choice"] for group in data["groups"]] == list(result.chosen.choices)
    assert all(sum(point["counts"].values()) == 2 for point in data["front"])


def test_the_picture_has_a_dot_per_point_and_one_that_was_chosen(
    result: SearchResult, tmp_path: Path
) -> None:
    result.to_svg(tmp_path / "f.svg")
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    dots = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(dots) == len(result.front) > 2
    assert [d.get("fill") for d in dots].count("#cc0000") == 1
    across = [float(d.get("cx", "")) for d in dots]
    up = [float(d.get("cy", "")) for d in dots]
    assert across == sorted(across)
    assert up == sorted(up), "more bits, less loss: lower in the picture"


def test_the_terminal_shows_choices_and_front(result: SearchResult) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show_search(result, console)
    text = console.export_text()
    assert "2 groups of modules" in text
    assert f"{result.bits:.3f} bits per weight" in text
    assert text.count("\n") > len(result.front)


SPECS: list[Any] = [
    "int8",
    "nvfp4",
    "mxfp8",
    {"format": "int4", "size": 32},
    {"format": "int4", "options": {"narrow": True}, "size": 64},
    {"format": "int8", "granularity": "channel"},
    {"format": "int8", "granularity": "channel", "axis": 1},
    {"format": "int8", "granularity": "channel", "axis": [0, 1]},
    {"format": "fp8", "granularity": "block", "rows": 8, "cols": 16},
    {"format": "int8", "granularity": "tensor", "amax": 3.5},
    {"format": "int8", "granularity": "tensor", "rotate": {"block": 8, "back": True}},
    {"format": "int8", "granularity": "tensor", "affine": {"axes": [-1], "method": "mid"}},
    [{"format": "int4", "size": 128}, {"format": "fp8", "granularity": "tensor"}],
]


@pytest.mark.parametrize("said", SPECS, ids=str)
def test_a_spec_is_said_so_that_it_means_the_same(said: Any, toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(128, 128))
    recipe = {"rules": [{"match": "0", "weight": said}]}
    (one,) = plan_candidates(model, {"x": recipe}, toolkit).every

    slots = slots_data(one.entries["0"], toolkit.registry.formats)

    again = recipe_of({"0": slots}, name="y", description="", algorithm=["max"])
    assert toolkit.plan(model, again).entries[0].spec == one.plan.entries[0].spec


@pytest.mark.parametrize(
    "said",
    [
        {"format": "int8", "granularity": "token"},
        {"format": "int8", "granularity": "tensor", "dynamic": True},
        {"format": "int8", "granularity": "tensor"},
        {"format": "nvfp4", "dynamic": True},
    ],
    ids=str,
)
def test_specs_of_activations_mean_the_same_too(said: Any, toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(128, 128))
    recipe = {"rules": [{"match": "0", "weight": "int8", "input": said}]}
    (one,) = plan_candidates(model, {"x": recipe}, toolkit).every
    slots = slots_data(one.entries["0"], toolkit.registry.formats)
    found = resolve_spec(
        SpecModel.model_validate(
            {"format": slots["input"]} if isinstance(slots["input"], str) else slots["input"]
        ),
        Slot("input"),
        toolkit.registry.formats,
        where="",
    )
    assert found == one.entries["0"]["input"].spec


def test_what_is_so_anyway_is_left_out(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(128, 128))
    (one,) = plan_candidates(model, ["nvfp4"], toolkit).every
    slots = slots_data(one.entries["0"], toolkit.registry.formats)
    assert slots == {"weight": "nvfp4", "input": "nvfp4"}


def test_paths_that_look_like_patterns_mean_themselves(toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"a[0]*": nn.Linear(16, 16), "a0x": nn.Linear(16, 16)})
    recipe = recipe_of({"a[0]*": {"weight": "int8"}}, name="x", description="", algorithm=["max"])
    assert toolkit.plan(model, recipe).modules == ("a[0]*",)
