"""Real distributions: a dist-info directory and a module in a folder on ``sys.path``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bittern.builtin import hooks as builtin
from bittern.hooks.discovery import PluginOptions, PluginRecord, discover
from bittern.hooks.manager import PluginManager

HEALTHY = """
from bittern.hooks import hookimpl
from bittern.records import NumberFormat

@hookimpl
def register_formats():
    name = __name__.removesuffix("_hooks")
    return [NumberFormat(name=name, bits=8, codec="bittern.numerics.integers:IntCodec",
                         params={"bits": 8})]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on ``sys.path``; its modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Callable[..., str]:
    """Installs a plugin distribution and returns its name."""

    def make(
        name: str,
        source: str = HEALTHY,
        *,
        entry: str | None = None,
        version: str = "1.2.3",
        requires: tuple[str, ...] = (),
        kind: str = "dist-info",
        metadata: bool = True,
    ) -> str:
        module = f"{name.replace('-', '_')}_hooks"
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        stem = name.replace("-", "_")
        info = site / (f"{stem}-{version}.dist-info" if kind == "dist-info" else f"{stem}.egg-info")
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {text}" for text in requires]
        lines += ["Provides-Extra: target", "Provides-Extra: other"]
        if metadata:
            file = "METADATA" if kind == "dist-info" else "PKG-INFO"
            (info / file).write_text("\n".join(lines) + "\n\n")
        entries = f"[bittern.plugins]\n{entry or name} = {module}\n"
        (info / "entry_points.txt").write_text(entries)
        return name

    return make


@pytest.fixture
def found(site: Path) -> Callable[[], list[PluginRecord]]:
    """Discovers the plugins that this test installed, and no others."""

    def make() -> list[PluginRecord]:
        return [r for r in discover() if (site / f"{r.entry}.py").exists()]

    return make


@pytest.fixture
def manager(found: Callable[[], list[PluginRecord]]) -> Callable[..., PluginManager]:
    """Loads the plugins that this test installed beside core's own rules."""

    def make(**options: Any) -> PluginManager:
        return PluginManager(PluginOptions(**options), builtin=builtin, records=found())

    return make
