"""``bittern search``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Bittern = Callable[..., Any]
Data = Callable[..., str]

SEARCH = ("search", "toy:model", "--candidates", "int4,int8", "--seq-len", 6)


def test_a_search_writes_a_recipe_that_quantize_takes(
    toy_bittern: Bittern, data: Data, tmp_path: Path
) -> None:
    recipe, plot = tmp_path / "mixed.yaml", tmp_path / "front.svg"

    done = toy_bittern(*SEARCH, "--data", data(), "--bits", 14, "--out", recipe, "--plot", plot)

    assert done.code == 0, done.err
    assert "bits per weight" in done.out
    assert f"wrote {recipe}" in done.out
    assert plot.read_text().startswith("<svg")
    then = toy_bittern("plan", "toy:model", "--recipe", recipe, "--json")
    assert then.code == 0, then.err
    assert then.json["algorithm"] == [{"name": "max", "options": {}}]


def test_json_is_one_object_with_the_recipe(
    toy_bittern: Bittern, data: Data, tmp_path: Path
) -> None:
    out = tmp_path / "mixed.yaml"
    done = toy_bittern(*SEARCH, "--data", data(), "--bits", 14, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["chosen"]["bits"] <= 14
    assert done.json["recipe"] == yaml.safe_load(out.read_text())


@pytest.mark.parametrize("method", ["gradient", "kl", "layer"])
def test_every_method_can_be_asked_for(method: str, toy_bittern: Bittern, data: Data) -> None:
    done = toy_bittern(*SEARCH, "--data", data(), "--bits", 14, "--method", method, "--json")
    assert done.code == 0, done.err
    assert done.json["method"] == method


def test_latencies_come_from_a_file(toy_bittern: Bittern, data: Data, tmp_path: Path) -> None:
    plain = toy_bittern(*SEARCH, "--data", data(), "--bits", 14, "--json").json
    names = [path for group in plain["groups"] for path in group["members"]]
    table = {name: {"int4": 3.0, "int8": 1.0, "none": 2.0} for name in names}
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(table))

    done = toy_bittern(
        *SEARCH, "--data", data(), "--max-seconds", len(names), "--latency", file, "--json"
    )

    assert done.code == 0, done.err
    assert done.json["chosen"]["seconds"] == len(names)
    assert set(done.json["chosen"]["counts"]) == {"int8"}


def test_scores_are_kept_and_used_again(toy_bittern: Bittern, data: Data, tmp_path: Path) -> None:
    scores = tmp_path / "s.json"
    call = (*SEARCH, "--data", data(), "--scores", scores, "--json")
    first = toy_bittern(*call, "--bits", 14)
    again = toy_bittern(*call, "--bits", 12)
    other = toy_bittern(*call, "--bits", 12, "--method", "kl")
    assert first.code == again.code == 0
    assert first.json["groups"][0]["options"] == again.json["groups"][0]["options"]
    assert other.code == 2
    assert "another search (method: was gradient, is kl" in other.json["what"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ((), "no limit"),
        (("--bits", 1), "bits <= 1"),
        (("--bits", 14, "--candidates", "int5"), "int5"),
        (("--bits", 14, "--out", "/nowhere/x.yaml"), "directory of the file is not there"),
        (("--bits", 14, "--exclude", "nothing"), "matches no module"),
        (("--max-seconds", 1, "--latency", "/nowhere/x.json"), "x.json"),
    ],
)
def test_mistakes_end_with_exit_code_2(
    options: tuple[object, ...], what: str, toy_bittern: Bittern, data: Data
) -> None:
    done = toy_bittern(*SEARCH, "--data", data(), *options)
    assert done.code == 2
    assert what in done.err
