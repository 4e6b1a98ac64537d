"""Reads recipes: names or files, ``extends``, overrides, and errors that name the nearest key."""

from __future__ import annotations

import copy
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bittern.config.schema import (
    AlgorithmModel,
    MatchModel,
    Recipe,
    RuleModel,
    SpecModel,
    as_algorithms,
)
from bittern.config.text import parse_yaml, read_recipe_text
from bittern.errors import RecipeError
from bittern.records import RecipeSource

__all__ = ["RecipeLike", "load_recipe", "parse_override", "read_source", "recipe_schema"]

RecipeLike = str | Path | Mapping[str, Any] | Recipe
Lookup = Callable[[str], RecipeSource]

_MODELS: tuple[type[BaseModel], ...] = (Recipe, RuleModel, MatchModel, SpecModel, AlgorithmModel)


def load_recipe(recipe: RecipeLike, *, lookup: Lookup, overrides: Sequence[str] = ()) -> Recipe:
    """Return the whole recipe, ``extends`` resolved and overrides applied.

    Args:
        recipe: A name, the path of a YAML file, plain data, or a `Recipe`.
        lookup: Finds the source of a named recipe; raises `RecipeError` for an unknown name.
        overrides: ``"dotted.path=YAML value"``; ``*`` stands for every item of a list.

    Raises:
        RecipeError: Unknown name or key, malformed file, circular ``extends``.
    """
    if isinstance(recipe, Recipe):
        if not overrides and not recipe.extends:
            return recipe
        recipe = recipe.model_dump(by_alias=True, exclude_unset=True)
    data, where = _read(recipe, lookup)
    data = _extended(data, where, lookup, ())
    if "algorithm" in data:  # so that an override finds the list behind every shorthand
        data["algorithm"] = as_algorithms(data["algorithm"])
    for override in overrides:
        path, value = parse_override(override)
        _override(data, path, value, override)
    return _validate(data, where)


def read_source(source: RecipeSource) -> dict[str, Any]:
    """Return the data of a registered recipe.

    Raises:
        RecipeError: The file is missing or malformed.
    """
    if source.package is None or source.resource is None:
        return {"name": source.name, **copy.deepcopy(dict(source.data))}
    try:
        file = importlib.resources.files(source.package) / source.resource
        text = file.read_text(encoding="utf-8")
    except (OSError, ImportError, TypeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe {source.name!r} cannot be read: {error}", where=source.package
        ) from error
    return {"name": source.name, **_parse(text, source.name)}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``"a.b.0=value"`` into its path and its YAML value.

    Raises:
        RecipeError: There is no ``=``, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"the override {text!r} has no value",
            hint="write -o strict=false, or rules.0.input=fp8",
        )
    try:
        return key.strip().split("."), parse_yaml(value)
    except RecipeError as error:
        raise RecipeError(f"the override {text[:200]!r}: {error.what}") from error


def _read(recipe: str | Path | Mapping[str, Any], lookup: Lookup) -> tuple[dict[str, Any], str]:
    if isinstance(recipe, Mapping):
        return copy.deepcopy(dict(recipe)), str(recipe.get("name", "recipe"))
    text = str(recipe)
    if isinstance(recipe, Path) or text.endswith((".yaml", ".yml")):
        path = Path(recipe)
        return {"name": path.stem, **_parse(read_recipe_text(path), text)}, text
    return read_source(lookup(text)), text


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(error.what, where=where) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(
            f"a recipe is a mapping, this is a {type(data).__name__}",
            where=where,
            hint="start with `extends: base` and `rules:`",
        )
    return data


def _extended(
    data: dict[str, Any], where: str, lookup: Lookup, seen: tuple[str, ...]
) -> dict[str, Any]:
    """Merge the parents' rules before ours; every other key of ours replaces theirs."""
    merged: dict[str, Any] = {}
    for parent in _names(data, "extends", where):
        if parent in seen:
            raise RecipeError(f"extends itself: {' -> '.join((*seen, parent))}", where=where)
        above, origin = _read(parent, lookup)
        above = _extended(above, origin, lookup, (*seen, parent))
        for own in ("name", "description"):  # they are the parent's, not ours
            above.pop(own, None)
        rules = [*merged.get("rules", []), *above.pop("rules")]
        requires = [*merged.get("requires", []), *above.pop("requires")]
        merged = {**merged, **above, "rules": rules, "requires": requires}
    own_rules = data.get("rules") or []
    if not isinstance(own_rules, list):
        raise RecipeError("rules must be a list", where=where, hint="write `rules:` and `- match:`")
    rules = [*merged.get("rules", []), *own_rules]
    requires = [*merged.get("requires", []), *_names(data, "requires", where)]
    return {**merged, **data, "rules": rules, "requires": requires}


def _names(data: dict[str, Any], key: str, where: str) -> list[str]:
    """Take the names under ``key`` out of a recipe: one string, or a list of them."""
    value = data.pop(key, None)
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(
            f"{key} must be a name or a list of names", where=where, hint=f"write `{key}: [base]`"
        )
    return names


def _override(data: Any, path: list[str], value: Any, text: str) -> None:
    key, rest = path[0], path[1:]
    if isinstance(data, list):
        if key == "+" and not rest:
            data.append(value)
            return
        if key == "*":
            indices = list(range(len(data)))
        elif key.lstrip("-").isdigit() and -len(data) <= int(key) < len(data):
            indices = [int(key)]
        else:
            raise RecipeError(
                f"the override {text!r} names item {key!r} of a list of {len(data)}",
                hint="use a number, * for every item, or + for a new one",
            )
        for index in indices:
            if not rest:
                data[index] = value
            else:
                if isinstance(data[index], str):
                    data[index] = {"name": data[index]}
                _override(data[index], rest, value, text)
        return
    if not isinstance(data, dict):
        raise RecipeError(f"the override {text!r} goes into a plain value at {key!r}")
    if not rest:
        data[key] = value
        return
    child = data.get(key)
    if isinstance(child, str):  # `weight: int4` is short for `weight: {format: int4}`
        child = {"name" if key == "match" else "format": child}
        data[key] = child
    elif child is None:
        child = data[key] = [] if rest == ["+"] else {}
    _override(child, rest, value, text)


def _validate(data: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> RecipeError:
    problems = error.errors()  # a mistyped key comes before what is missing because of it
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    path = ".".join(location)
    if first["type"] == "extra_forbidden":
        from difflib import SequenceMatcher

        key = location[-1]
        known = _known_keys(location[:-1])
        near = max(known, key=lambda k: SequenceMatcher(None, key.lower(), k.lower()).ratio())
        return RecipeError(
            f"unknown key {path!r}",
            where=where,
            hint=f"did you mean {near!r}? known here: {', '.join(sorted(known))}",
        )
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(
        f"{path}: {message}" if path else message,
        where=where,
        hint="`bittern recipes show int8` shows a whole recipe",
    )


def _known_keys(parents: list[str]) -> list[str]:
    """Return the keys allowed under a path such as ``["rules", "0", "weight"]``."""
    names = [part for part in parents if not part.isdigit()]
    model: type[BaseModel] = Recipe
    for name in names:
        nested: dict[str, type[BaseModel]] = {
            "rules": RuleModel,
            "match": MatchModel,
            "skip": MatchModel,
            "algorithm": AlgorithmModel,
        }
        model = nested.get(name, SpecModel)
    return [field.alias or name for name, field in model.model_fields.items()]
