"""What the pages show runs, and what they name is there: Python, commands, links."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from bittern.cli.context import App
from bittern.cli.main import make_cli

DEMO = "plugins/huggingface/src/bittern_huggingface/demo"
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
INLINE = re.compile(r"`(bittern [^`]+)`")
# What comes from a distribution that need not be installed here.
PLUGIN_COMMANDS = {"demo"}


def test_the_python_of_a_page_runs_and_prints_what_it_says(
    python_page: Path, root: Path, tmp_path: Path, open_page: Callable[[Path], Any]
) -> None:
    if python_page == root / "README.md":
        _lay_out_the_readme(root, tmp_path)
    if python_page.name == "megatron.md":
        pytest.importorskip("megatron.core", reason="pip install 'bittern-megatron[target]'")
    if python_page.name == "huggingface.md":
        pytest.importorskip("peft", reason="pip install 'bittern-huggingface[target,train]'")
    with open_page(python_page) as session:
        session.run()


def test_the_plugin_of_a_page_passes_the_conformance_kit(
    tested_page: Path, open_page: Callable[[Path], Any]
) -> None:
    with open_page(tested_page) as session:
        session.run()
    done = session.pytest()
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) > 10


def _lay_out_the_readme(root: Path, folder: Path) -> None:
    """Put a model and texts where the README's code looks for them."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers: pip install 'bittern-huggingface[target]'")
    (folder / "path/to/a").mkdir(parents=True)
    (folder / "path/to/a/llama").symlink_to(root / DEMO / "model")
    for name, source in (("text.txt", "calibration.txt"), ("heldout.txt", "heldout.txt")):
        text = (root / DEMO / source).read_text(encoding="utf-8")
        (folder / name).write_text(text[:20_000], encoding="utf-8")


def test_the_commands_of_a_page_exist(page: Path, read_blocks: Callable[[Path], Any]) -> None:
    text = page.read_text(encoding="utf-8")
    lines = INLINE.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for block in read_blocks(page):
        if block.language in ("", "sh"):
            lines += re.findall(r"(?:^|; )(bittern [^;&\n]+)", block.text, re.MULTILINE)
    for line in lines:
        problem = _problem(shlex.split(line, comments=True)[1:])
        assert problem is None, f"{line}: {problem}"


def _problem(words: list[str]) -> str | None:
    """Return what is wrong with a command line, as far as names and options go."""
    if any(word in PLUGIN_COMMANDS for word in words):
        return None
    command: click.Command = make_cli()
    context: click.Context | None = None
    while True:
        context = click.Context(command, parent=context, info_name=command.name, obj=App())
        try:
            _, words, _ = command.make_parser(context).parse_args(words)
        except click.NoSuchOption as error:
            return error.format_message()
        except click.UsageError:
            return None  # the page leaves out a value
        words = [word for word in words if word != "..."]
        if not isinstance(command, click.Group) or not words:
            return None
        name, *words = words
        found = command.get_command(context, name)
        if found is None:
            return f"there is no command {name!r}"
        command = found


def test_a_command_that_does_not_exist_would_be_found() -> None:
    assert _problem(["plugins", "lists"]) == "there is no command 'lists'"
    assert "--recipes" in str(_problem(["quantize", "model", "--recipes", "int8"]))
    assert _problem(["--no-plugin", "egret", "quantize", "..."]) is None
    assert "--no-plug-in" in str(_problem(["--no-plug-in", "egret", "quantize"]))


def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Sphinx looks at those of docs/, with their anchors; nobody at those of the others."""
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
