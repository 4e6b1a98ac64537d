"""What importing and using core must not import."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Fresh = Callable[[str], Any]

FRAMEWORKS = {
    "accelerate",
    "apex",
    "compressed_tensors",
    "datasets",
    "megatron",
    "onnx",
    "transformer_engine",
    "transformers",
    "triton",
    "vllm",
}
HEAVY = {"torch", "numpy", "safetensors", *FRAMEWORKS}
LOADED = (
    "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
)


def test_importing_bittern_imports_next_to_nothing(fresh_python: Fresh) -> None:
    loaded = set(fresh_python(f"import bittern; {LOADED}"))

    assert "bittern" in loaded
    assert not loaded & {*HEAVY, "pluggy", "pydantic", "yaml", "rich", "click"}


@pytest.mark.parametrize(
    "module",
    [
        "bittern.records",
        "bittern.config",
        "bittern.hooks",
        "bittern.hooks.specs",
        "bittern.hooks.manager",
        "bittern.registry",
        "bittern.errors",
        "bittern.builtin.hooks",
        "bittern.toolkit",
        "bittern.api",
        "bittern.report",
    ],
)
def test_the_lower_floors_and_the_toolkit_import_no_torch(module: str, fresh_python: Fresh) -> None:
    loaded = set(fresh_python(f"import {module}; {LOADED}"))
    assert not loaded & HEAVY


def test_looking_around_needs_no_torch(fresh_python: Fresh) -> None:
    """Recipes, formats, rules and plugins can be listed in no time."""
    loaded = set(
        fresh_python(
            "from bittern.toolkit import Toolkit\n"
            "toolkit = Toolkit()\n"
            "registry = toolkit.registry\n"
            "tables = registry.formats, registry.algorithms, registry.exporters, registry.recipes\n"
            "assert all(list(table) for table in tables)\n"
            "assert list(registry.modules)\n"
            "assert toolkit.recipe('int8').rules\n" + LOADED
        )
    )
    assert not loaded & HEAVY


def test_quantizing_evaluating_and_exporting_imports_no_framework_and_starts_no_gpu(
    fresh_python: Fresh, tmp_path: Path
) -> None:
    code = (
        "import bittern\n"
        "bittern.quantize, bittern.evaluate, bittern.export\n"
        "import json, sys\n"
        "early = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "data = [torch.ones(2, 8)]\n"
        "result = bittern.quantize(model, 'int8', data)\n"
        "bittern.evaluate(model, data)\n"
        f"bittern.export(model, {str(tmp_path / 'out')!r})\n"
        "late = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([early, late, torch.cuda.is_initialized()]))\n"
    )
    early, late, initialised = fresh_python(code)

    assert not set(early) & HEAVY, "naming the functions of the package imports torch"
    assert not set(late) & FRAMEWORKS
    assert initialised is False


def test_a_plugins_entry_module_is_light(root: Path, fresh_python: Fresh) -> None:
    """A plugin loads in milliseconds: its hooks module imports no framework, and no torch."""
    import tomllib

    for file in sorted(root.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        for entry in project["entry-points"]["bittern.plugins"].values():
            loaded = set(fresh_python(f"import {entry}; {LOADED}"))
            assert not loaded & HEAVY, entry


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_no_file_of_core_imports_a_framework_or_a_plugin(root: Path) -> None:
    plugins = {path.name for path in root.glob("plugins/*/src/*") if path.is_dir()}
    files = sorted((root / "core").rglob("*.py"))
    assert len(files) > 50

    found = {str(f.relative_to(root)): imported(ast.parse(f.read_text())) for f in files}
    guilty = {name: sorted(n & (FRAMEWORKS | plugins)) for name, n in found.items()}
    assert not {name: names for name, names in guilty.items() if names}
