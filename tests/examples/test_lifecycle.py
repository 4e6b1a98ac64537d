"""The calls of a real run are those that the page about the lifecycle shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import bittern
from bittern.errors import BitternError
from bittern.hooks import specs
from bittern.testing import PluginHarness, hooks_module
from bittern.toolkit import Toolkit

PAGE = "docs/plugin-authors/lifecycle.md"
HOOKS = {n: f for n, f in vars(specs).items() if hasattr(f, "bittern_spec")}


def said(root: Path) -> dict[str, list[str]]:
    """Return step to hooks, as the page has them."""
    text = (root / PAGE).read_text(encoding="utf-8")
    lines = text.partition("```{lifecycle}\n")[2].partition("```")[0].splitlines()
    rows = [[part.strip() for part in line.split("|")] for line in lines if line]
    return {name: [hook.strip() for hook in hooks.split(",")] for name, _, hooks in rows}


def listener(calls: list[str]) -> ModuleType:
    """Make a plugin that implements every hook and notes that it was called."""

    def implementation(name: str, arguments: list[str]) -> Callable[..., Any]:
        source = f"def {name}({', '.join(arguments)}):\n    calls.append({name!r})"
        namespace: dict[str, Any] = {"calls": calls}
        exec(source, namespace)
        return namespace[name]

    return hooks_module(
        "listener",
        **{n: implementation(n, list(inspect.signature(f).parameters)) for n, f in HOOKS.items()},
    )


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Step to the hooks that it called, in order, each once; every table is collected anew."""
    heard: dict[str, list[str]] = {}
    folder = tmp_path_factory.mktemp("lifecycle")

    def step(name: str, run: Callable[[Toolkit], Any], *, refused: bool = False) -> Any:
        calls: list[str] = []
        found = None
        with PluginHarness(listener(calls)) as harness:
            if refused:  # the listener answers no question, and core has no answer of its own
                with pytest.raises(BitternError, match="no plugin can"):
                    run(harness.toolkit)
            else:
                found = run(harness.toolkit)
        heard[name] = list(dict.fromkeys([*heard.get(name, ()), *calls]))
        return found

    model, data = nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)]
    step("load", lambda tools: tools.load("somewhere"), refused=True)
    step("trace", lambda tools: tools.trace(model, data[0]))
    plan = step("plan", lambda tools: tools.plan(model, "int8"))
    step("convert", lambda tools: tools.convert(model, plan))
    for name in ("calibrate", "evaluate"):
        step(name, lambda tools: tools.data("somewhere", model), refused=True)
    step("calibrate", lambda tools: tools.calibrate(model, plan, data))
    step("evaluate", lambda tools: tools.evaluate(model, data))
    step("export", lambda tools: tools.export(model, folder / "out", verify=False))
    step("verify", lambda tools: tools.verify(folder / "out"))
    step("save", lambda tools: tools.save(model, folder / "state"))
    step("revert", lambda _: bittern.revert(model))
    step("restore", lambda tools: tools.restore(model, folder / "state"))
    return heard


STEPS = [
    "load",
    "trace",
    "plan",
    "convert",
    "calibrate",
    "evaluate",
    "export",
    "verify",
    "save",
    "restore",
]


def test_the_page_has_every_step(root: Path) -> None:
    assert list(said(root)) == STEPS


@pytest.mark.parametrize("name", STEPS)
def test_a_step_calls_the_hooks_that_the_page_says(
    name: str, root: Path, heard: dict[str, list[str]]
) -> None:
    assert heard[name] == said(root)[name], f"correct the line {name!r} in {PAGE}"


def test_reverting_calls_none(heard: dict[str, list[str]]) -> None:
    assert heard["revert"] == []


def test_the_page_has_every_hook_that_is_called(root: Path) -> None:
    from bittern.cli.hookdocs import hook_docs

    shown = {hook for hooks in said(root).values() for hook in hooks} | {"register_commands"}
    assert shown == {doc.name for doc in hook_docs() if not doc.reserved}
