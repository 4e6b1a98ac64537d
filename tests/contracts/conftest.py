"""Fixtures of the contracts: the source files and fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def source_paths(root: Path) -> list[Path]:
    """The folders that a Python path needs for core and every plugin, installed or not."""
    return [root / "core" / "src", *sorted(root.glob("plugins/*/src"))]


@pytest.fixture(scope="session")
def fresh_python(source_paths: list[Path]) -> Callable[[str], Any]:
    """Runs code in a new interpreter without installed plugins; returns what it prints as JSON."""

    def run(code: str) -> Any:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BITTERN_")}
        environment["BITTERN_DISABLE_PLUGINS"] = "*"
        environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in source_paths)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
