"""Reads YAML that anybody may have written: plain data only, and no more of it than was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bittern.errors import RecipeError
from bittern.reading import read_text

__all__ = ["parse_yaml", "read_recipe_text"]

LIMIT = 2**20  # bytes of a file
MARKS = 100_000  # of YAML; each costs the parser about a kilobyte and 50 microseconds
VALUES = 200_000  # once every alias stands for what it names


def read_recipe_text(path: Path) -> str:
    """Return the text of a recipe's file.

    Raises:
        RecipeError: It is missing, no regular file, too large, or not UTF-8.
    """
    try:
        return read_text(path, error=RecipeError, limit=LIMIT)
    except RecipeError as error:
        raise RecipeError(
            f"the recipe file {path} cannot be read: {error.what}",
            hint="give a name from `bittern recipes`, or the path of a YAML file",
        ) from error


def parse_yaml(text: str) -> Any:
    """Return the data of a YAML text, made of plain values only.

    Raises:
        RecipeError: It is not YAML, names a type of Python, or is too much: aliases of aliases
            can stand for more values than any memory holds.
    """
    if sum(map(text.count, "[{,:\n-&*")) > MARKS:
        raise RecipeError("holds more values than a recipe can have")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > VALUES:
                raise RecipeError("its aliases stand for more values than a recipe can have")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError("nested too deeply for a recipe") from error
    except (ValueError, TypeError, OverflowError) as error:  # dates and numbers that are none
        raise RecipeError(f"not YAML: {error}") from error


def _values(node: yaml.Node, seen: dict[int, int]) -> int:
    """Count values as if every alias were written out.

    Raises:
        RecipeError: A value contains itself.
    """
    known = seen.get(id(node))
    if known == 0:
        raise RecipeError("a value contains itself by an alias")
    if known is None:
        seen[id(node)] = 0  # under way
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known = seen[id(node)] = 1 + sum(_values(part, seen) for part in parts)
    return known
