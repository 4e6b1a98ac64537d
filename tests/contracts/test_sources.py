"""Habits that a machine can hold: sizes, no print, no pickle, documented names and hooks."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import bittern
from bittern.hooks import specs

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("core/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")])
# The one file that names pickle: it makes loading one raise, in the conformance kit.
FORBIDS_PICKLE = ROOT / "core/src/bittern/testing/pickles.py"
HOOKS = {
    name: function
    for name, function in vars(specs).items()
    if inspect.isfunction(function) and hasattr(function, "bittern_spec")
}
# The plan's hooks (design: architecture), and resolve_model, which the command line needs.
PLANNED = {
    "register_modules",
    "register_symbols",
    "register_trace_leaves",
    "register_trace_ops",
    "register_formats",
    "register_algorithms",
    "register_modes",
    "register_exporters",
    "register_kernels",
    "register_recipes",
    "register_commands",
    "resolve_model",
    "resolve_model_adapter",
    "resolve_weight_access",
    "resolve_parallel_state",
    "resolve_calibration_data",
    "resolve_checkpoint_io",
    "discover_modules",
    "after_convert",
    "run_calibration",
    "after_export",
}


def test_there_are_sources_to_look_at() -> None:
    assert len(SOURCES) > 60


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_is_short_and_keeps_the_habits(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says why it exists"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "eval", "exec", "torch.load"), f"line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names}
            assert "*" not in names, f"line {node.lineno}"
            module = getattr(node, "module", None)
            if file != FORBIDS_PICKLE:
                assert not ({*names, module} & {"pickle", "cloudpickle", "dill"}), node.lineno


@pytest.mark.parametrize("name", bittern.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(bittern, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_every_planned_hook_is_specified() -> None:
    assert set(HOOKS) == PLANNED


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_a_hook_documents_exactly_its_arguments_and_its_result(name: str) -> None:
    function = HOOKS[name]
    doc = inspect.getdoc(function) or ""
    assert doc.splitlines()[0].endswith(".")
    section = doc.partition("Args:\n")[2].partition("\n\n")[0]
    documented = [
        line.strip().partition(":")[0]
        for line in section.splitlines()
        if line.startswith("    ") and not line.startswith("     ")
    ]
    assert documented == list(inspect.signature(function).parameters)
    returns = function.__annotations__["return"] not in ("None", None)
    assert ("Returns:" in doc) == returns


def test_a_lazy_name_lives_where_the_table_says() -> None:
    for home, names in bittern._HOMES.items():
        module = importlib.import_module(home)
        assert all(hasattr(module, name) for name in names)
