"""``bittern trace``."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def traced(toy_bittern, toy):
    """Call ``bittern trace`` on a model whose plugin knows its inputs."""
    toy.write_text(toy.read_text() + ADAPTER)
    return lambda *args: toy_bittern("trace", "toy:x", *args)


ADAPTER = """

@hookimpl
def resolve_model_adapter(model):
    import torch
    from bittern.records import ModelAdapter

    return ModelAdapter(example_inputs=lambda: {"input": torch.zeros(1, 3, dtype=torch.int64)})
"""


def test_shows_what_was_found(traced):
    done = traced()
    assert done.code == 0
    assert done.err == ""
    assert "groups: dimensions that change together" in done.out
    assert "1 takes over an input scale of 3" in done.out
    assert "3 weight-bearing modules analysed (100%)" in done.out


def test_json_is_the_trace_as_data(traced):
    done = traced("--json")
    assert done.err == ""
    assert set(done.json) == {"groups", "shared_inputs", "foldable", "coverage"}
    assert [(f["producer"], f["consumers"]) for f in done.json["foldable"]] == [("1", ["3"])]
    members = {(m["module"], m["tensor"], m["dim"]) for m in done.json["groups"][1]["members"]}
    assert members == {("1", "weight", 0), ("1", "bias", 0), ("3", "weight", 1)}


@pytest.mark.parametrize("name", ["1", "3.weight"])
def test_explain(name, traced):
    words = traced("--explain", name).out
    assert "go together with" in words
    assert "groups" not in words
    assert traced("--explain", name, "--json").json["explanation"] in words


def test_tree(traced):
    tree = traced("--tree").out
    assert tree.splitlines() == [
        "Sequential",
        "  0: Embedding  weight [16!, 8]",
        "  1: Linear  weight [8, 8]  bias [8]",
        "  3: Linear  weight [16!, 8]  bias [16!]",
    ]
    assert traced("--tree", "--json").json["tree"] == tree


def test_explain_of_an_unknown_name(traced):
    done = traced("--explain", "2.weight")
    assert done.code == 2
    assert "the model has no module or tensor '2.weight'" in done.err
    assert "closest" in done.err


def test_dot_goes_to_a_file(traced, tmp_path):
    file = tmp_path / "trace.dot"
    done = traced("--dot", file)
    assert done.code == 0
    assert f"wrote {file}" in done.out.replace("\n", "")
    assert file.read_text().startswith("digraph trace {")
    assert [p.name for p in tmp_path.glob(".*")] == []
    assert set(traced("--dot", file, "--json").json) >= {"groups", "coverage"}


def test_dot_goes_to_a_pipe(traced):
    out = traced("--dot", "-").out
    assert out.startswith("digraph trace {")
    assert out.rstrip().endswith("}")
    assert traced("--dot", "-", "--json").json["dot"].startswith("digraph trace {")


def test_a_file_that_cannot_be_written(traced, tmp_path):
    done = traced("--dot", tmp_path / "no" / "such" / "trace.dot")
    assert done.code != 0
    assert "cannot be written" in done.err
    assert "Traceback" not in done.err


def test_a_model_whose_inputs_nobody_knows(toy_bittern):
    done = toy_bittern("trace", "toy:x")
    assert done.code == 2
    assert "no plugin knows inputs for this model" in done.err
    found = toy_bittern("trace", "toy:x", "--json").json
    assert found["error"] == "TraceError"
    assert json.dumps(found)


def test_a_model_that_cannot_be_loaded(toy_bittern):
    assert toy_bittern("trace", "toy:huge").code != 0
