"""Reading recipes: names, files, data, extends, overrides, and errors that help."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bittern.config import Recipe, load_recipe, parse_override, read_source, recipe_schema
from bittern.errors import RecipeError
from bittern.records import RecipeSource

Load = Callable[..., Recipe]


@pytest.fixture
def sources() -> dict[str, dict[str, Any]]:
    """Named recipes; tests add to it."""
    return {
        "base": {"skip": [{"role": "head"}], "algorithm": "max", "description": "the base"},
        "eight": {
            "extends": "base",
            "requires": "alpha",
            "rules": [{"match": {"class": "Linear"}, "weight": "int8"}],
        },
        "inputs": {"rules": [{"match": "*", "input": "int8"}], "strict": False},
    }


@pytest.fixture
def load(sources: dict[str, dict[str, Any]]) -> Load:
    def lookup(name: str) -> RecipeSource:
        if name not in sources:
            raise RecipeError(f"unknown recipe {name!r}")
        return RecipeSource(name=name, data=sources[name])

    def make(recipe: Any, *overrides: str) -> Recipe:
        return load_recipe(recipe, lookup=lookup, overrides=overrides)

    return make


def weights(recipe: Recipe) -> list[tuple[str, str | None]]:
    return [(str(r.match), r.weight.format if r.weight else None) for r in recipe.rules]


# --- sources --------------------------------------------------------------------------------------


def test_a_name_is_looked_up(load: Load) -> None:
    recipe = load("eight")

    assert recipe.name == "eight"
    assert weights(recipe) == [("class Linear", "int8")]


def test_a_file_is_read(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: eight\nrules:\n- match: '*.down'\n  weight: int4\n")

    for source in (file, str(file)):
        recipe = load(source)
        assert recipe.name == "mine"
        assert weights(recipe) == [("class Linear", "int8"), ("*.down", "int4")]


def test_data_is_taken_and_left_as_it_was(load: Load) -> None:
    data = {"extends": "base", "rules": [{"match": "*", "weight": {"format": "int8"}}]}
    before = copy.deepcopy(data)
    recipe = load(data, "rules.0.weight.format=int4", "rules.0.weight.size=32", "strict=false")

    assert recipe.rules[0].weight is not None
    assert (recipe.rules[0].weight.format, recipe.rules[0].weight.size) == ("int4", 32)
    assert data == before


def test_a_registered_recipe_is_not_changed_by_overrides(
    load: Load, sources: dict[str, Any]
) -> None:
    before = copy.deepcopy(sources)
    assert weights(load("eight", "rules.0.weight=int4")) == [("class Linear", "int4")]

    assert sources == before
    assert weights(load("eight")) == [("class Linear", "int8")]


def test_a_recipe_object_comes_back_as_it_is(load: Load) -> None:
    recipe = load("eight")
    assert load(recipe) is recipe


def test_a_recipe_object_is_overridden_in_a_copy(load: Load) -> None:
    recipe = load("eight")
    changed = load(recipe, "rules.0.weight=none", "strict=false")

    assert weights(changed) == [("class Linear", None)]
    assert "weight" in changed.rules[0].specs()
    assert weights(recipe) == [("class Linear", "int8")]


def test_a_recipe_object_that_extends_is_resolved(load: Load) -> None:
    recipe = load(Recipe.model_validate({"name": "mine", "extends": "eight"}))

    assert weights(recipe) == [("class Linear", "int8")]
    assert recipe.extends == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "not YAML"),
        ("- a\n- b\n", "a recipe is a mapping, this is a list"),
        ("just words", "a recipe is a mapping, this is a str"),
        ("a: 1\na: &x *y\n", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(
    text: str, message: str, load: Load, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load(file)
    assert caught.value.where == str(file)


def test_an_empty_file_is_an_empty_recipe(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing\n")
    assert load(file).rules == []


@pytest.mark.parametrize("kind", ["missing", "directory", "binary"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(
    kind: str, load: Load, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    if kind == "directory":
        file.mkdir()
    elif kind == "binary":
        file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match=r"mine\.yaml cannot be read") as caught:
        load(file)
    assert "bittern recipes" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("package", "resource"), [("no_such_package", "x.yaml"), ("bittern.builtin", "recipes/no.yaml")]
)
def test_a_registered_file_that_is_missing_is_a_recipe_error(package: str, resource: str) -> None:
    with pytest.raises(RecipeError, match="'x' cannot be read"):
        read_source(RecipeSource(name="x", package=package, resource=resource))


# --- extends --------------------------------------------------------------------------------------


def test_rules_of_parents_come_first_and_other_keys_are_replaced(load: Load) -> None:
    recipe = load(
        {
            "name": "mine",
            "extends": ["eight", "inputs"],
            "requires": ["beta"],
            "rules": [{"match": "x", "weight": "fp8"}],
            "skip": [],
        }
    )

    assert [str(rule.match) for rule in recipe.rules] == ["class Linear", "*", "x"]
    assert recipe.requires == ["alpha", "beta"]
    assert recipe.skip == []
    assert recipe.strict is False
    assert recipe.extends == []


def test_a_skip_list_is_inherited_where_the_child_has_none(load: Load) -> None:
    assert [str(match) for match in load("eight").skip] == ["role head"]


def test_a_later_parent_replaces_what_an_earlier_one_says(load: Load) -> None:
    assert load({"extends": ["inputs", "eight"]}).strict is False
    assert load({"extends": ["inputs"], "strict": True}).strict is True


def test_the_name_and_description_of_a_parent_are_not_inherited(load: Load) -> None:
    recipe = load({"extends": "eight"})

    assert recipe.name == "unnamed"
    assert recipe.description == ""


def test_files_can_be_extended(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: eight\nrules: [{match: a, weight: int4}]\n")
    recipe = load({"extends": str(tmp_path / "a.yaml")})

    assert weights(recipe) == [("class Linear", "int8"), ("a", "int4")]


def test_a_common_ancestor_is_no_circle(load: Load, sources: dict[str, Any]) -> None:
    sources["left"] = {"extends": "base"}
    sources["right"] = {"extends": "base"}

    assert load({"extends": ["left", "right"]}).algorithm[0].name == "max"


@pytest.mark.parametrize(
    ("circle", "message"),
    [
        ({"a": "a"}, "extends itself: a -> a"),
        ({"a": "b", "b": "a"}, "extends itself: b -> a -> b"),
        ({"a": ["base", "b"], "b": "c", "c": "a"}, "extends itself: b -> c -> a -> b"),
    ],
)
def test_a_circle_is_an_error_that_shows_it(
    circle: dict[str, Any], message: str, load: Load, sources: dict[str, Any]
) -> None:
    sources.update({name: {"extends": parents} for name, parents in circle.items()})
    with pytest.raises(RecipeError, match=message):
        load("a")


def test_an_unknown_parent_is_an_error(load: Load) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'nope'"):
        load({"extends": "nope"})


# --- unknown keys and wrong types -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "path", "nearest"),
    [
        ({"rule": []}, "rule", "rules"),
        ({"strickt": True}, "strickt", "strict"),
        ({"rules": [{"mach": "*"}]}, "rules.0.mach", "match"),
        ({"rules": [{"match": "*", "wieght": "int8"}]}, "rules.0.wieght", "weight"),
        ({"rules": [{"match": {"clas": "Linear"}}]}, "rules.0.match.clas", "class"),
        (
            {"rules": [{"match": "*"}, {"match": "*", "input": {"fromat": "int8"}}]},
            "rules.1.input.fromat",
            "format",
        ),
        (
            {"rules": [{"match": "*", "weight": {"format": "int8", "granularty": "x"}}]},
            "rules.0.weight.granularty",
            "granularity",
        ),
        (
            {"rules": [{"match": "*", "slots": {"q": {"format": "int8", "dynamc": True}}}]},
            "rules.0.slots.q.dynamc",
            "dynamic",
        ),
        ({"skip": [{"nam": "x"}]}, "skip.0.nam", "name"),
        ({"algorithm": [{"name": "max", "option": {}}]}, "algorithm.0.option", "options"),
        ({"kv_cache": {"format": "fp8", "siz": 4}}, "kv_cache.siz", "size"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_an_unknown_key_names_the_nearest_at_every_level(
    data: dict[str, Any], path: str, nearest: str, load: Load
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(data)

    assert caught.value.what == f"unknown key {path!r}"
    assert (caught.value.hint or "").startswith(f"did you mean {nearest!r}?")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rules": {"match": "*"}}, "rules must be a list"),
        ({"rules": "all"}, "rules must be a list"),
        ({"rules": [5]}, "rules.0: "),
        ({"rules": [{"weight": "int8"}]}, "rules.0.match: Field required"),
        ({"rules": [{"match": {}}]}, "rules.0.match: a match needs one of name, class, role"),
        ({"rules": [{"match": "*", "weight": 8}]}, "rules.0.weight: "),
        ({"extends": 5}, "extends must be a name or a list of names"),
        ({"extends": [{"a": 1}]}, "extends must be a name or a list of names"),
        ({"requires": 5}, "requires must be a name or a list of names"),
        ({"strict": "perhaps"}, "strict: "),
        ({1: 2}, "1: Keys should be strings"),
        ({"algorithm": 5}, "algorithm.0: "),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_that_says_where(
    data: Any, message: str, load: Load
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(data)
    assert caught.value.what.startswith(message)
    assert caught.value.where == "recipe"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"granularity": "rows"}, "granularity: Input should be"),
        ({"granularity": "group", "size": 0}, "size: Input should be greater than 0"),
        ({"granularity": "channel", "size": 4}, "size belongs to granularity: group"),
        ({"rows": 4}, "a block needs rows and cols"),
        ({"granularity": "block"}, "block needs rows and cols"),
        ({"granularity": "group", "rows": 4, "cols": 4}, "rows and cols belong to"),
        ({"size": 4, "rows": 4, "cols": 4}, "give one of them"),
        ({"axis": 1}, "axis belongs to granularity: channel"),
        ({"granularity": "token", "axis": 1}, "axis belongs to granularity: channel"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_together_are_refused(
    spec: dict[str, Any], message: str, load: Load
) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: rules\.0\.weight") as caught:
        load({"rules": [{"match": "*", "weight": {"format": "int8", **spec}}]})
    assert message in caught.value.what


# --- shorthands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("max", [("max", {})]),
        (["smooth", "gptq"], [("smooth", {}), ("gptq", {})]),
        ({"smooth": {"alpha": 0.5}}, [("smooth", {"alpha": 0.5})]),
        (
            [{"smooth": None}, {"name": "max", "options": {"p": 1}}],
            [("smooth", {}), ("max", {"p": 1})],
        ),
        ({"name": "max"}, [("max", {})]),
        (None, []),
        ([], []),
    ],
    ids=str,
)
def test_algorithms_have_shorthands(written: Any, expected: list[Any], load: Load) -> None:
    steps = load({"algorithm": written}).algorithm
    assert [(step.name, step.options) for step in steps] == expected


def test_max_is_the_default_algorithm(load: Load) -> None:
    assert [step.name for step in load({}).algorithm] == ["max"]


def test_slots_of_other_names_are_said_under_slots(load: Load) -> None:
    rule = load({"rules": [{"match": "*", "slots": {"q": "fp8", "k": "none"}}]}).rules[0]
    specs = rule.specs()

    assert list(specs) == ["q", "k"]
    assert specs["q"] is not None
    assert specs["q"].format == "fp8"
    assert specs["k"] is None


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("strict=false", ["strict"], False),
        (" rules.0.weight = int8", ["rules", "0", "weight"], "int8"),
        ("skip=[]", ["skip"], []),
        ("a={b: 1}", ["a"], {"b": 1}),
        ("description=a=b", ["description"], "a=b"),
        ("a=", ["a"], None),
    ],
)
def test_an_override_is_a_path_and_a_yaml_value(text: str, path: list[str], value: Any) -> None:
    assert parse_override(text) == (path, value)


@pytest.mark.parametrize(
    ("text", "why"), [("strict", "no value"), ("=1", "no value"), ("a=[", "not YAML")]
)
def test_a_malformed_override_is_an_error(text: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        parse_override(text)


@pytest.fixture
def two(sources: dict[str, Any]) -> None:
    sources["two"] = {
        "rules": [
            {"match": "a", "weight": "int4"},
            {"match": {"class": "Linear"}, "weight": {"format": "int8"}, "input": None},
        ],
        "skip": ["x", {"role": "head"}],
        "algorithm": "max",
    }


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("strict=false", "strict", False),
        ("rules.0.weight=fp8", "rules.0.weight.format", "fp8"),
        ("rules.-1.weight=fp8", "rules.1.weight.format", "fp8"),
        ("rules.*.weight.size=32", "rules.0.weight.size", 32),
        ("rules.*.weight.size=32", "rules.1.weight.size", 32),
        ("rules.0.weight.size=32", "rules.0.weight.format", "int4"),
        ("rules.1.input.format=fp8", "rules.1.input.format", "fp8"),
        ("rules.0.match.class=Linear", "rules.0.match.name", ["a"]),
        ("rules.0.match.class=Linear", "rules.0.match.class", ["Linear"]),
        ("rules.0.slots.q=fp8", "rules.0.slots.q.format", "fp8"),
        ("skip.0.role=head", "skip.0.name", ["x"]),
        ("algorithm.0.options.alpha=0.5", "algorithm.0.options.alpha", 0.5),
        ("algorithm.0.options.alpha=0.5", "algorithm.0.name", "max"),
        ("algorithm.0=gptq", "algorithm.0.name", "gptq"),
        ("algorithm=[smooth, gptq]", "algorithm.1.name", "gptq"),
        ("kv_cache.format=fp8", "kv_cache.format", "fp8"),
        ("skip.+=y", "skip.0.name", ["x"]),
        ("skip.+=y", "skip.2.name", ["y"]),
        ("rules.+={match: c, input: null}", "rules.2.match.name", ["c"]),
        ("requires.+=p", "requires.0", "p"),
    ],
)
def test_an_override_reaches(override: str, where: str, value: Any, load: Load) -> None:
    found: Any = load("two", override).model_dump(by_alias=True)
    for part in where.split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    assert found == value


@pytest.mark.usefixtures("two")
def test_overrides_apply_in_order_after_extends(load: Load) -> None:
    recipe = load(
        {"extends": "two", "strict": False},
        "rules.0.weight=fp8",
        "rules.0.weight=int8",
        "strict=true",
    )

    assert weights(recipe)[0] == ("a", "int8")
    assert recipe.strict is True


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules.2.weight=int8", "names item '2' of a list of 2"),
        ("rules.-3.weight=int8", "names item '-3' of a list of 2"),
        ("rules.first.weight=int8", "names item 'first' of a list of 2"),
        ("rules.0.weight.format.x=1", r"rules\.0\.weight\.format: Input should be a valid string"),
        ("strict.x.y=1", "strict: Input should be a valid boolean"),
        ("rules.0.wieght=int8", "unknown key 'rules.0.wieght'"),
        ("ruls.0=1", "unknown key 'ruls'"),
    ],
)
def test_an_override_that_leads_nowhere_is_an_error(
    override: str, message: str, load: Load
) -> None:
    with pytest.raises(RecipeError, match=message):
        load("two", override)


# --- the schema for editors -----------------------------------------------------------------------


def test_the_json_schema_is_json_and_knows_every_key() -> None:
    schema = json.loads(json.dumps(recipe_schema()))

    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["MatchModel"]["properties"]) == {"name", "class", "role"}
    assert all(model["additionalProperties"] is False for model in schema["$defs"].values())
