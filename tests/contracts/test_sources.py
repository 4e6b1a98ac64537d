"""What every source file keeps to: size, no print, no star, no pickle, floors."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 500  # lines


@pytest.fixture(scope="module")
def sources(source_paths: list[Path]) -> dict[Path, str]:
    """Every source file of core and of the plugins."""
    files = {
        f: f.read_text(encoding="utf-8") for p in source_paths for f in sorted(p.rglob("*.py"))
    }
    assert len(files) > 60
    return files


@pytest.fixture(scope="module")
def trees(sources: dict[Path, str]) -> dict[Path, ast.Module]:
    """Their syntax trees."""
    return {file: ast.parse(text, str(file)) for file, text in sources.items()}


def test_no_file_is_longer_than_a_person_reads(sources: dict[Path, str]) -> None:
    lines = {str(file): len(text.splitlines()) for file, text in sources.items()}
    assert not {name: count for name, count in lines.items() if count > LIMIT}


def test_every_file_says_what_is_in_it(trees: dict[Path, ast.Module]) -> None:
    assert not [str(file) for file, tree in trees.items() if not ast.get_docstring(tree)]


def test_nothing_is_printed(trees: dict[Path, ast.Module]) -> None:
    found = [
        f"{file}:{node.lineno}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"print", "breakpoint"}
    ]
    assert not found


def test_nothing_is_imported_by_a_star(trees: dict[Path, ast.Module]) -> None:
    found = [
        f"{file}:{node.lineno}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not found


PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "eval", "exec", "compile", "__import__"}
CALLS |= {f"yaml.{name}" for name in ("load", "full_load", "unsafe_load", "load_all", "Loader")}
OPTIONS = {"allow_pickle": "False", "trust_remote_code": "False", "weights_only": "True"}
# Imports pickle to forbid it: it patches the functions and calls none, which is checked too.
GUARD = "bittern/testing/pickles.py"


def pickling(tree: ast.Module, *, guard: bool) -> list[tuple[int, str]]:
    """Return the lines that import or call what runs code from data."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and not guard:
            names = {alias.name.partition(".")[0] for alias in node.names} & PICKLERS
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]} & PICKLERS
            if node.module == "torch":
                names |= {alias.name for alias in node.names} & {"load", "save"}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            names = {called} & CALLS
            if called.partition(".")[0] in PICKLERS:
                names.add(called)
            names |= {
                f"{k.arg}={ast.unparse(k.value)}"
                for k in node.keywords
                if k.arg in OPTIONS and ast.unparse(k.value) != OPTIONS[k.arg]
            }
        else:
            continue
        found += [(node.lineno, name) for name in names]
    return found


def test_nothing_is_pickled_or_evaluated(trees: dict[Path, ast.Module]) -> None:
    found = {
        str(file): lines
        for file, tree in trees.items()
        if (lines := pickling(tree, guard=file.as_posix().endswith(GUARD)))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import dill.settings",
        "torch.load('x')",
        "torch.save(x, 'y')",
        "from torch import load",
        "eval('1')",
        "yaml.load(text, Loader=yaml.Loader)",
        "numpy.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)",
        "read(file, weights_only=False)",
        "def f():\n    import marshal",
    ],
)
def test_what_is_forbidden_would_be_found(code: str) -> None:
    assert pickling(ast.parse(code), guard=False)


def test_the_guard_may_import_pickle_but_not_call_it() -> None:
    assert not pickling(ast.parse("import pickle\npatch(pickle, 'load')"), guard=True)
    assert pickling(ast.parse("import pickle\npickle.loads(b'')"), guard=True)


def test_the_floors_only_look_down(root: Path, source_paths: list[Path]) -> None:
    """import-linter, with the contracts of pyproject.toml."""
    beside = Path(sys.executable).parent / "lint-imports"
    command = str(beside) if beside.exists() else shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed: pip install 'bittern[lint]'")
    paths = os.pathsep.join(str(path) for path in source_paths)
    done = subprocess.run(
        [command, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_code_of_a_model_repository_is_run(trees: dict[Path, ast.Module]) -> None:
    """Classes of the Auto family ask at the terminal unless they are told no."""
    calls = [
        (f"{file}:{node.lineno}", node)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    keywords = [
        (place, keyword.value)
        for place, call in calls
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    ]
    asking = [
        place
        for place, call in calls
        if ast.unparse(call.func).rpartition("transformers.")[2].startswith("Auto")
        and ast.unparse(call.func).endswith(".from_pretrained")
        and place not in dict(keywords)
    ]
    assert len(keywords) >= 3
    assert not [place for place, value in keywords if ast.unparse(value) != "False"]
    assert not asking
