"""Recipes that anybody may have written: plain data, of a size that was there to read."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import PLACES, byte_damage
from hypothesis import given
from hypothesis import strategies as st

from bittern.config import parse_yaml
from bittern.errors import BitternError, RecipeError
from bittern.toolkit import Toolkit

RECIPE = b"""\
extends: base
description: mine
rules:
  - match: {class: Linear, name: "*.up"}
    weight: &w {format: int8, granularity: {kind: channel, axis: 0}}
    input: {format: int8}
  - match: {class: Conv2d}
    weight: *w
algorithm:
  - max
  - {method: smooth, alpha: 0.5}
"""

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)

BAD = {
    "aliases of aliases": LAUGHS,
    "merges of merges": MERGES,
    "a list in itself": "rules: &a [*a]",
    "a mapping in itself": "rules: &a {x: *a}",
    "a key that is a list": "? [1, 2]\n: 3",
    "deep lists": "[" * 20_000 + "]" * 20_000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(3000)),
    "an unknown tag": "rules: !mine {}",
    "a Python object": "rules: !!python/object/apply:os.system [touch here]",
    "a Python name": "rules: !!python/name:os.system",
    "a Python module": "rules: !!python/module:os",
    "a new Python object": "rules: !!python/object/new:os.system [touch here]",
    "a day that is none": "rules: 2001-99-99",
    "a number of many digits": "rules: " + "9" * 5000,
    "base64 that is none": "rules: !!binary x",
    "two documents": "a: 1\n---\nb: 2",
    "a document that goes on and on": "- x\n" * 200_000,
    "control characters": "a: \x07",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_what_is_no_plain_data_is_refused(
    text: str, tmp_path: Path, toolkit: Toolkit, no_hang: Callable[[], None]
) -> None:
    no_hang()
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    here = set(Path().iterdir())
    with pytest.raises(RecipeError):
        toolkit.recipe(file)
    assert set(Path().iterdir()) == here, "something ran"


def test_aliases_of_aliases_take_no_memory() -> None:
    tracemalloc.start()
    try:
        for text in (LAUGHS, MERGES):
            with pytest.raises(RecipeError, match="aliases stand for more values"):
                parse_yaml(text)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_plain_aliases_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize("place", list(PLACES)[1:])
def test_a_recipe_that_is_no_file_is_not_waited_for(
    place: str, tmp_path: Path, toolkit: Toolkit, no_hang: Callable[[], None]
) -> None:
    no_hang()
    file = tmp_path / "mine.yaml"
    file.write_bytes(RECIPE)
    PLACES[place](file)
    with pytest.raises(RecipeError, match="cannot be read"):
        toolkit.recipe(file)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, toolkit: Toolkit) -> None:
    file = tmp_path / "mine.yaml"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(RecipeError, match="larger than"):
        toolkit.recipe(file)


def attempt(toolkit: Toolkit, file: Path, data: bytes) -> None:
    file.write_bytes(data)
    try:
        toolkit.recipe(file)
    except BitternError as error:
        assert str(error)  # noqa: PT017 - each of hundreds


def test_bytes_that_changed_on_their_way(
    tmp_path: Path, toolkit: Toolkit, no_hang: Callable[[], None]
) -> None:
    for _, data in byte_damage(RECIPE, 400):
        no_hang()
        attempt(toolkit, tmp_path / "mine.yaml", data)


FRAGMENTS = st.sampled_from(
    [*"[]{},:&*?!|>-'\"%@`#\n \t<=a1", "&a", "*a", "<<", "!!", "? ", "- ", ": ", "rules", "0x", "~"]
)


@given(st.lists(FRAGMENTS, max_size=40).map("".join))
def test_any_text_is_data_or_one_error(text: str) -> None:
    try:
        parse_yaml(text)
    except RecipeError as error:
        assert error.what  # noqa: PT017 - one of hundreds
