"""What the benchmarks share: clocks, fresh processes, the environment, the table, the JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Figure", "best", "cpu_seconds", "environment", "fresh", "parser", "report"]

VARIABLES = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
PACKAGES = ("bittern", "bittern-huggingface", "bittern-kernels", "torch", "transformers")


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        what: What was measured.
        value: How much, in ``unit``.
        unit: ``"s"``, ``"ms"``, ``"us"``, ``"MiB"``, ``"x"``.
        goal: The value that should not be exceeded.
        note: A comparison, or what the figure rests on.
    """

    what: str
    value: float
    unit: str
    goal: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; ``None`` without a goal."""
        return None if self.goal is None else self.value <= self.goal


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser with ``--json``; ``doc`` is the script's docstring."""
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    return found


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Return the CPU seconds (user and system, all threads) that one call takes.

    With one thread this is the wall time of an idle machine, and it stays usable on a shared one.
    """
    start = time.process_time()
    function()
    return time.process_time() - start


def best(function: Callable[[], Any], *, repeats: int = 5) -> float:
    """Return the fewest CPU seconds of several calls, one more going before."""
    function()
    return min(cpu_seconds(function) for _ in range(repeats))


def fresh(*arguments: str) -> dict[str, Any]:
    """Run Python with ``arguments`` in a fresh process; return the JSON on its last line.

    Raises:
        RuntimeError: It failed; with what it wrote to stderr.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def environment(**more: object) -> dict[str, object]:
    """Return what a figure depends on: versions, processor, cores, load."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": versions,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **more,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(
    title: str, figures: Iterable[Figure], *, json_path: Path | None, about: dict[str, object]
) -> None:
    """Print the table and write the JSON; ``about`` is the `environment` before the run."""
    figures = list(figures)
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=title, title_justify="left")
    for name, justify in (("what", "left"), ("measured", "right"), ("goal", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for figure in figures:
        style = {None: "", True: "green", False: "red"}[figure.met]
        goal = "" if figure.goal is None else f"<= {figure.goal:g} {figure.unit}"
        measured = f"{figure.value:.3g} {figure.unit}"
        table.add_row(figure.what, f"[{style}]{measured}" if style else measured, goal, figure.note)
    console.print(table)
    versions = about["versions"]
    assert isinstance(versions, dict)
    console.print(
        f"{about['processor']}, {about['cores']} cores, load {about['load']}, "
        f"Python {about['python']}, torch {versions['torch']}",
        style="dim",
    )
    if json_path is not None:
        content = {
            "title": title,
            "environment": {**about, "load_after": list(os.getloadavg())},
            "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
