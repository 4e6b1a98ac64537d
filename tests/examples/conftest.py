"""Fixtures that read the Markdown pages and run what they show.

A fenced block is taken for what it says it is:

- ``python`` runs, in the order of the page, in one namespace; an ``output`` block right after it is
  what it prints, with ``...`` for any text;
- a block of any language whose first line is ``# path/to/a.file`` is that file;
- ``pip install -e .`` in an ``sh`` block installs the files so far, as the page's distribution.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(`{3,})(\S*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w.-]+(?:/[\w.-]+)*\.(?:py|toml|yaml))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The path of the file that the block is, if it is one."""
        found = FILE.match(self.text)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[2], match[3], text.count("\n", 0, match.start()) + 1)
        for match in FENCE.finditer(text)
    ]


class Session:
    """Runs the blocks of one page in a folder of its own.

    Args:
        page: The page.
        folder: An empty folder; files are written into it, and code runs in it.
    """

    def __init__(self, page: Path, folder: Path) -> None:
        self.page = page
        self.folder = folder
        self.site = folder / ".site"
        self.paths = [str(self.site), str(folder / "src"), str(folder)]
        self.namespace: dict[str, Any] = {"__name__": "page"}

    def __enter__(self) -> Session:
        self._modules = set(sys.modules)
        self._cwd = Path.cwd()
        self._random = torch.random.get_rng_state()  # pages seed the global generator
        os.chdir(self.folder)
        sys.path[:0] = self.paths
        _fresh_toolkit()
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self._cwd)
        torch.random.set_rng_state(self._random)
        for path in self.paths:
            sys.path.remove(path)
        for name in set(sys.modules) - self._modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(self.folder)):
                del sys.modules[name]
        importlib.invalidate_caches()
        _fresh_toolkit()

    def run(self) -> None:
        """Run every block of the page."""
        printed = ""
        for block in blocks_of(self.page):
            if block.file is not None:
                self.write(block)
            elif block.language == "python":
                printed = self.execute(block)
            elif block.language == "output":
                self.compare(block, printed)
            elif block.language == "sh" and "pip install -e ." in block.text:
                self.install()

    def write(self, block: Block) -> None:
        """Write the file that a block is."""
        assert block.file is not None
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        importlib.invalidate_caches()

    def execute(self, block: Block) -> str:
        """Run a block and return what it printed; a traceback shows the page's line."""
        code = compile("\n" * block.line + block.text, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, self.namespace)
        return out.getvalue()

    def compare(self, block: Block, printed: str) -> None:
        """Compare what was printed with what the page says."""
        same = doctest.OutputChecker().check_output(block.text, printed, doctest.ELLIPSIS)
        where = f"{self.page.name}:{block.line}"
        assert same, f"{where} says\n{block.text}\nnot\n{printed}"

    def install(self) -> None:
        """Install the page's distribution, as ``pip install -e .`` does, for this session."""
        from hatchling.build import build_editable

        with contextlib.redirect_stdout(io.StringIO()):
            wheel = build_editable(str(self.folder))
        with zipfile.ZipFile(self.folder / wheel) as archive:
            archive.extractall(self.site)
        importlib.invalidate_caches()
        _fresh_toolkit()

    def pytest(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the page's tests as its reader does."""
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(self.paths)},
            capture_output=True,
            text=True,
            check=False,
        )


def _fresh_toolkit() -> None:
    from bittern.toolkit import default_toolkit

    default_toolkit.cache_clear()


# --- what the tests get ---------------------------------------------------------------------------


def _pages() -> Iterator[Path]:
    """Yield every page that a reader meets."""
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted(p for p in ROOT.glob("docs/**/*.md") if "_build" not in p.parts)
    yield from sorted(ROOT.glob("plugins/*/README.md"))
    yield from sorted(ROOT.glob("benchmarks/*.md"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``page`` every page, ``python_page`` those with Python, ``tested_page`` with tests."""
    chosen = {
        "page": lambda page: True,
        "python_page": lambda page: any(b.language == "python" for b in blocks_of(page)),
        "tested_page": lambda page: any("test_" in (b.file or "") for b in blocks_of(page)),
    }
    for name, wanted in chosen.items():
        if name in metafunc.fixturenames:
            found = [page for page in _pages() if wanted(page)]
            names = [page.relative_to(ROOT).as_posix() for page in found]
            metafunc.parametrize(name, found, ids=names)


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[[Path], Session]:
    """Opens a page in an empty folder."""
    return lambda page: Session(page, tmp_path)


@pytest.fixture
def read_blocks() -> Callable[[Path], list[Block]]:
    """Reads the fenced blocks of a page."""
    return blocks_of
