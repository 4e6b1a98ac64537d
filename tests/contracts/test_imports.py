"""What importing and running core may load, and what its sources may import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "src" / "bittern"
FRAMEWORKS = {
    "transformers",
    "accelerate",
    "megatron",
    "transformer_engine",
    "apex",
    "triton",
    "compressed_tensors",
    "datasets",
}
PLUGINS = {p.name for p in ROOT.glob("plugins/*/src/*") if p.is_dir()}


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh process holds after ``code``."""
    code += "\nimport sys, json\nprint(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"BITTERN_DISABLE_PLUGINS": "*"},
    )
    return set(json.loads(process.stdout.splitlines()[-1]))


def imported_by(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno


def test_importing_bittern_loads_neither_torch_nor_pydantic_nor_rich() -> None:
    assert not loaded_after("import bittern") & {"torch", "pydantic", "rich", "numpy", "pluggy"}


def test_the_toolkit_with_its_plugins_loads_no_torch() -> None:
    assert "torch" not in loaded_after("import bittern.toolkit; bittern.toolkit.Toolkit()")


def test_quantizing_a_plain_model_loads_no_framework_and_starts_no_gpu() -> None:
    code = """
import torch, bittern as bt
model = torch.nn.Sequential(torch.nn.Linear(16, 16))
bt.quantize(model, "int8", data=[torch.randn(2, 16)])
bt.evaluate(model, [torch.randn(2, 16)])
assert not torch.cuda.is_initialized()
"""
    loaded = loaded_after(code)
    assert "torch" in loaded
    assert not loaded & (FRAMEWORKS | PLUGINS)


@pytest.mark.parametrize("file", sorted(CORE.rglob("*.py")), ids=lambda f: str(f.relative_to(CORE)))
def test_core_imports_no_framework_and_no_plugin(file: Path) -> None:
    found = [
        (name, line)
        for name, line in imported_by(file)
        if name.split(".")[0] in FRAMEWORKS | PLUGINS
    ]
    assert not found


def test_the_floors_look_down() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    program = Path(sys.executable).with_name("lint-imports")
    process = subprocess.run([program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
