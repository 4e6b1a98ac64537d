"""A folder on ``sys.path`` for modules and distributions that live as long as one test."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["Site"]


class Site:
    """A temporary folder in front of ``sys.path``; on closing, its modules are forgotten."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="bittern-site-")).resolve()
        sys.path.insert(0, str(self.path))

    def close(self) -> None:
        """Take the folder from ``sys.path`` and forget what was imported from it."""
        with contextlib.suppress(ValueError):
            sys.path.remove(str(self.path))
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file.startswith(str(self.path) + os.sep):
                del sys.modules[name]
        sys.path_importer_cache.pop(str(self.path), None)
        importlib.invalidate_caches()
        shutil.rmtree(self.path, ignore_errors=True)

    def add_module(self, name: str, source: str) -> None:
        """Write the module ``name``, packages above it included."""
        *parents, last = name.split(".")
        folder = self.path
        for parent in parents:
            folder /= parent
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / f"{last}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()

    def add_package(self, name: str, files: Mapping[str, str]) -> None:
        """Write the package ``name`` from file names and sources."""
        for file, source in {"__init__.py": "", **files}.items():
            path = self.path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()

    def add_distribution(
        self,
        name: str,
        version: str,
        *,
        requires: Iterable[str] = (),
        entry_points: Mapping[str, str] | None = None,
        group: str = "",
        top_level: str | None = None,
    ) -> None:
        """Write the dist-info of a distribution, as an installer would.

        Args:
            name: Its name.
            version: Its version.
            requires: Requirements; those of extras have a marker ``extra == "..."``.
            entry_points: Name to object reference, in ``group``.
            group: Entry-point group.
            top_level: The import name it provides.
        """
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {text}" for text in requires]
        lines += ["Provides-Extra: target"]
        (info / "METADATA").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        if entry_points:
            entries = "\n".join(f"{key} = {value}" for key, value in entry_points.items())
            (info / "entry_points.txt").write_text(f"[{group}]\n{entries}\n", encoding="utf-8")
        if top_level is not None:
            (info / "top_level.txt").write_text(top_level + "\n", encoding="utf-8")
        importlib.invalidate_caches()
