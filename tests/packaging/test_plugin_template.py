"""Installs the rendered template with pip into a fresh environment and runs its own tests there.

The environment sees this one's packages, so that pip resolves the plugin's requirements for real
without an index; what is installed into it is the plugin and its made-up framework alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin-template"
BITTERN = "from bittern.cli.main import main; main()"


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BITTERN_", "PYTHON"))}
    process = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-4000:]
    return process.stdout


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return the interpreter of a fresh environment beside this one's packages."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    found = venv / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(found, "-c", purelib, cwd=tmp_path).strip())
    here = sysconfig.get_path("purelib")
    (site / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return found


@pytest.fixture
def pip(python: Path, tmp_path: Path) -> Callable[..., str]:
    """Return pip for that environment, without an index."""
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index")
    options = ("--no-build-isolation", "--disable-pip-version-check")
    return lambda *wanted: run(*command, *options, *wanted, cwd=tmp_path / "plugin")


def test_the_template_installs_and_passes_its_own_tests(
    python: Path, pip: Callable[..., str], tmp_path: Path
) -> None:
    plugin = tmp_path / "plugin"
    shutil.copytree(EXAMPLE, plugin, ignore=shutil.ignore_patterns("__pycache__"))

    def shown() -> dict[str, str]:
        text = run(python, "-c", BITTERN, "plugins", "show", "heron", "--json", cwd=tmp_path)
        found: dict[str, str] = json.loads(text)
        return found

    pip(".")
    assert shown()["status"] == "target-missing"
    assert shown()["remedy"] == "pip install 'bittern-heron[target]'"

    pip("./framework", ".[target,test]")
    assert shown()["status"] == "loaded"
    shutil.rmtree(plugin / "src")  # what is tested is what pip installed
    out = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=plugin)
    assert " passed" in out.splitlines()[-1]
    assert "failed" not in out
