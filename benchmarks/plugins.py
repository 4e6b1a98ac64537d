"""What thirty installed plugins cost: at ``import bittern``, and at the first use.

    python benchmarks/plugins.py [--plugins N] [--repeats N] [--json FILE]

The plugins are real distributions in a temporary folder on ``sys.path``, each with a requirement of
core, a target that is installed, a module rule, a format, an exporter and a recipe, as
``bittern plugins new`` writes them. First use is a Toolkit with every table collected. Each case
runs in a fresh interpreter with and without the folder, in turn; a figure is the difference of the
medians of wall time, within one process measured around the statement itself.

Measured (AMD EPYC, 2 shared cores, load 2 to 3, Python 3.11), 30 plugins beside two others:

    import bittern: added       0.2 ms <= 50 ms
    first use: added             23 ms <= 150 ms
    bittern --help: added        18 ms

The first use was 49 ms while each plugin's metadata was parsed anew for its name, its version and
its requirements, and the path scanned for each version that was asked for.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, environment, fresh, parser, report

HOOKS = '''
"""What this plugin registers."""
from __future__ import annotations

from bittern.hooks import hookimpl
from bittern.records import Exporter, ModuleRule, NumberFormat, RecipeSource, Slot


@hookimpl
def register_modules() -> list[ModuleRule]:
    slots = (Slot("weight", kind="weight", tensor="weight"), Slot("input", channel_axis=-1))
    names = [f"{name}.layers:Linear{{i}}" for i in range(8)]
    return [ModuleRule(target=n, quantized="{name}.modules:Quant", slots=slots) for n in names]


@hookimpl
def register_formats() -> list[NumberFormat]:
    return [NumberFormat(name="{name}", bits=8, codec="bittern.numerics.integers:IntCodec")]


@hookimpl
def register_exporters() -> list[Exporter]:
    return [Exporter(name="{name}", write="{name}.export:write")]


@hookimpl
def register_recipes() -> list[RecipeSource]:
    return [RecipeSource(name="{name}", data={{"rules": []}})]
'''
METADATA = """Metadata-Version: 2.1
Name: bittern-{name}
Version: 1.0
Requires-Dist: bittern>=0.1,<0.2
Provides-Extra: target
Requires-Dist: numpy>=1; extra == "target"
"""
MEASURE = """
import json, sys, time
sys.path[:0] = {path!r}
{before}
start = time.perf_counter()
{code}
took = time.perf_counter() - start
from bittern.toolkit import default_toolkit
loaded = [r.name for r in default_toolkit().plugins.records if r.active]
print(json.dumps({{"seconds": took, "plugins": len(loaded), "torch": "torch" in sys.modules}}))
"""
FIRST_USE = """
toolkit = default_toolkit()
for table in ("modules", "formats", "algorithms", "exporters", "recipes", "kernels"):
    getattr(toolkit.registry, table)
"""
# Name to what goes before the clock, what is timed, and the goal in milliseconds.
CASES = {
    "import bittern": ("", "import bittern", 50.0),
    "first use": ("from bittern.toolkit import default_toolkit", FIRST_USE, 150.0),
    "bittern --help": ("", "", None),
}
HELP = """
from bittern.cli.main import make_cli
try:
    make_cli().main(["--help"])
except SystemExit:
    pass
"""


def install(folder: Path, count: int) -> None:
    """Write ``count`` plugin distributions."""
    for i in range(count):
        name = f"wing_{i:02d}"
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('"""A plugin."""\n')
        (folder / name / "hooks.py").write_text(HOOKS.format(name=name))
        info = folder / f"bittern_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA.format(name=name))
        entries = f"[bittern.plugins]\n{name.replace('_', '-')} = {name}.hooks\n"
        (info / "entry_points.txt").write_text(entries)


def run(name: str, folder: Path | None) -> dict[str, Any]:
    """Return seconds and loaded plugins of one case in a fresh process."""
    before, code, _ = CASES[name]
    path = [] if folder is None else [str(folder)]
    if name == "bittern --help":
        code = HELP
    return fresh("-c", MEASURE.format(path=path, before=before, code=code))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plugins", type=int, default=30)
    arguments.add_argument("--repeats", type=int, default=9)
    args = arguments.parse_args()
    about = environment(plugins=args.plugins)
    for name in [n for n in os.environ if n.startswith("BITTERN_")]:
        del os.environ[name]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles what it installs
    figures = []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        install(folder, args.plugins)
        for name, (_, _, goal) in CASES.items():
            runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
            for _ in range(args.repeats + 1):  # the first writes the byte code
                for there, found in runs.items():
                    found.append(run(name, folder if there else None))
            more = runs[True][0]["plugins"] - runs[False][0]["plugins"]
            if more != args.plugins:
                raise RuntimeError(f"{more} of {args.plugins} plugins were loaded")
            without, with_ = (
                statistics.median(r["seconds"] for r in found[1:]) * 1e3 for found in runs.values()
            )
            note = f"{with_:.1f} against {without:.1f} ms, {with_ / without:.2f} x"
            added = f"{args.plugins} plugins, {name}: added"
            figures.append(Figure(added, with_ - without, "ms", goal, note))
    report("Plugins", figures, json_path=args.json, about=about)


if __name__ == "__main__":
    main()
