"""A toy plugin, a way to call the command line, and fake installed distributions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from bittern.cli.main import make_cli

TOY = '''
import errno
import time
from dataclasses import replace
from pathlib import Path

from bittern.hooks import hookimpl
from bittern.records import Exporter, ExportReport, Finding, Verification


@hookimpl
def resolve_model(source, config):
    if not source.startswith("toy:"):
        return None
    if source == "toy:never":
        raise SystemExit("the model was loaded")
    if source == "toy:huge":
        raise MemoryError
    if source == "toy:gpu":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")
    if source == "toy:bug":
        raise ValueError("a bug in the plugin")
    import torch
    from torch import nn

    torch.manual_seed(0)
    if source == "toy:experts":
        return Experts(nn).eval()
    return nn.Sequential(
        nn.Embedding(16, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16)
    ).eval()


def Experts(nn):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 16) for _ in range(3))

        def forward(self, ids):
            return self.experts[1](self.embed(ids))

    return Experts()


@hookimpl
def resolve_calibration_data(source, model, config):
    if not source.endswith(".pt-toy"):
        return None
    word = Path(source).read_text().strip()
    if word == "interrupt":
        raise KeyboardInterrupt
    if word in ("interrupt-later", "wait"):
        return Trouble(word, Path(source).with_suffix(".started"))
    return batches(min(int(word), config.samples or int(word)), config)


def batches(rows, config):
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(0, 16, (rows, config.seq_len or 6), generator=generator)
    return list(ids.split(config.batch_size))


class Trouble:
    def __init__(self, kind, marker):
        self.kind, self.marker = kind, marker

    def __iter__(self):
        import torch

        yield torch.zeros(1, 4, dtype=torch.int64)
        if self.kind == "wait":
            self.marker.touch()
            for _ in range(600):  # in slices: a signal just before a sleep does not end it
                time.sleep(0.1)
        raise KeyboardInterrupt


def write_well(model, path, context):
    from bittern.exporting.plain import write_plain

    return write_plain(model, path, context)


def write_full(model, path, context):
    (path / "half").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def write_interrupted(model, path, context):
    (path / "half").write_text("half")
    raise KeyboardInterrupt


def verify_badly(path, record):
    findings = tuple(Finding(f"layer.{i}", "is wrong", "do it again") for i in range(3))
    return Verification(ok=False, path=str(path), client="toy-client", findings=findings)


def verify_interrupted(path, record):
    raise KeyboardInterrupt


def refuse(model, context):
    from bittern.errors import ExportError

    raise ExportError("the client cannot load this", hint="use another recipe")


@hookimpl
def register_exporters():
    here = __name__ + ":"
    base = Exporter(name="", write=here + "write_well", client="toy-client", priority=-1)
    return [
        replace(base, name="full", write=here + "write_full", verify=here + "verify_badly"),
        replace(base, name="stop", write=here + "write_interrupted", verify=here + "verify_badly"),
        replace(base, name="wrong", verify=here + "verify_badly"),
        replace(base, name="hangs", verify=here + "verify_interrupted"),
        replace(base, name="refused", verify=here + "verify_badly", check=here + "refuse"),
        replace(base, name="clientless"),
    ]


@hookimpl
def register_commands(cli):
    import click

    from bittern.cli.context import json_option, pass_app

    @cli.command()
    @json_option
    @pass_app
    def hello(app):
        """Say hello."""
        formats = list(app.toolkit.registry.formats)
        app.emit({"formats": formats}) if app.json else click.echo("hello " + formats[0])
        return 3  # not an exit code

    @cli.command(hidden=True)
    @click.argument("what")
    @json_option
    def crash(what):
        """Fail."""
        if what == "os":
            raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")
        raise {"key": KeyError, "eof": EOFError, "stop": KeyboardInterrupt}[what](what)
'''


@pytest.fixture(scope="session")
def installed() -> str:
    """Names of the plugins that are really installed, as ``BITTERN_DISABLE_PLUGINS`` takes them."""
    return ",".join(e.name for e in importlib.metadata.entry_points(group="bittern.plugins"))


@pytest.fixture(autouse=True)
def _only_core(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    """Core alone: what else is installed must not decide these tests."""
    for name in list(os.environ):
        if name.startswith("BITTERN_") or name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BITTERN_DISABLE_PLUGINS", installed)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    return file


@pytest.fixture
def data(tmp_path: Path) -> Callable[[object], str]:
    """Return a function that writes a toy data file and returns its path."""

    def write(content: object = 20) -> str:
        file = tmp_path / f"{content}.pt-toy"
        file.write_text(str(content))
        return str(file)

    return write


class Outcome:
    """What one call of the command line did."""

    def __init__(self, result: Result) -> None:
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object; stdout must hold nothing else."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Bittern = Callable[..., Outcome]


@pytest.fixture
def bittern() -> Bittern:
    """Call ``bittern`` in this process."""

    def call(*args: object) -> Outcome:
        return Outcome(CliRunner().invoke(make_cli(), [str(a) for a in args]))

    return call


@pytest.fixture
def toy_bittern(bittern: Bittern, toy: Path) -> Bittern:
    """Call ``bittern`` with the toy plugin."""
    return lambda *args: bittern("--plugin", toy, *args)


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a fresh process."""

    def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *args],
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that installs a fake distribution with a plugin."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(
        name: str, source: str = "", *, requires: tuple[str, ...] = (), distribution: str = ""
    ) -> str:
        distribution = distribution or f"bittern-{name}"
        module = f"fake_{uuid4().hex}"
        hooks = "from bittern.hooks import hookimpl\n" + textwrap.dedent(source)
        (site / f"{module}.py").write_text(hooks)
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        lines = [f"Requires-Dist: {r}" for r in requires]
        metadata = ["Metadata-Version: 2.1", f"Name: {distribution}", "Version: 1.2", *lines]
        (info / "METADATA").write_text("\n".join(metadata) + "\n")
        (info / "entry_points.txt").write_text(f"[bittern.plugins]\n{name} = {module}\n")
        return str(site)

    return make
