"""``examples/plugin-template`` is what ``bittern plugins new`` writes, byte for byte."""

from __future__ import annotations

from pathlib import Path

from bittern.cli.scaffold import render, scaffold

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin-template"
AGAIN = (
    "render it again: rm -r examples/plugin-template && "
    "bittern plugins new heron --output examples/plugin-template"
)


def test_the_example_is_the_rendered_template() -> None:
    expected = {name: text.encode() for name, text in render(scaffold("heron")).items()}
    found = {
        file.relative_to(EXAMPLE).as_posix(): file.read_bytes()
        for file in EXAMPLE.rglob("*")
        if file.is_file() and not any(map(_left_behind, file.relative_to(EXAMPLE).parts))
    }

    assert sorted(found) == sorted(expected), AGAIN
    assert found == expected, AGAIN


def _left_behind(part: str) -> bool:
    """Whether a name is that of what building, testing and linting leave."""
    return part.startswith((".", "__pycache__")) or part == "dist" or part.endswith(".egg-info")
