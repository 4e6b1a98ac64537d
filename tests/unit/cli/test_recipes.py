"""``bittern recipes``."""

import json

import pytest
import yaml


def test_lists_names_with_their_plugin(bittern):
    done = bittern("recipes")
    assert (done.code, done.err) == (0, "")
    assert "int8-weight-only" in done.out
    rows = bittern("recipes", "--json").json["recipes"]
    assert {"name", "description", "plugin"} == set(rows[0])
    assert "fp8-dynamic" in [row["name"] for row in rows]


def test_show_is_yaml_that_can_be_used(bittern, toy_bittern, tmp_path):
    done = bittern("recipes", "show", "int8")
    assert yaml.safe_load(done.out)["extends"] == "base"
    file = tmp_path / "mine.yaml"
    file.write_text(done.out)
    assert toy_bittern("plan", "toy:x", "-r", file).code == 0


@pytest.mark.parametrize("name", ["base", "int8", "int4", "fp8-dynamic"])
def test_resolved_stands_alone_and_is_the_same(bittern, tmp_path, name):
    shown = bittern("recipes", "show", name, "--resolved").out
    data = yaml.safe_load(shown)
    assert "extends" not in data
    assert data["skip"]
    file = tmp_path / "mine.yaml"
    file.write_text(shown)
    again = bittern("recipes", "show", file, "--resolved", "--json").json
    assert again == bittern("recipes", "show", name, "--resolved", "--json").json == data


def test_show_of_a_file(bittern, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: int8\nrules: []\n")
    assert bittern("recipes", "show", file, "--json").json == {"extends": "int8", "rules": []}
    file.write_text("rulez: []\n")
    done = bittern("recipes", "show", file, "--json")
    assert done.code == 2
    assert "'rules'" in done.json["hint"]


def test_unknown_recipe_names_the_nearest(bittern):
    done = bittern("recipes", "show", "int88", "--json")
    assert done.code == 2
    assert "'int8'" in done.json["hint"]


def test_schema_is_json(bittern):
    done = bittern("recipes", "schema")
    assert done.code == 0
    assert "rules" in json.loads(done.out)["properties"]
