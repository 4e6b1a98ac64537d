"""What restoring a saved state costs, against loading the same tensors and converting.

    python benchmarks/restore.py [--json FILE]

Stacks of Linears: 96 of 4 MiB each, and 1920 small ones, in which the work per
module shows. CPU seconds of one thread, the best of several fresh models, files in the page cache.
"Load" is ``load_state_dict`` of what `safetensors` reads from the very same file, "convert" swaps
classes by a plan. ModelOpt 0.47: ``restore`` takes 10 times a ``load_state_dict`` (measured on
another machine), and runs pickle.

Measured (AMD EPYC, 2 cores, Python 3.11, torch 2.13 CPU), restore / (load + convert), over three
runs, the last of them on idle cores:

    96 Linears of 1024 x 1024    int8 1.41 to 1.64, int4 1.42 to 1.57, nvfp4 1.66 to 1.83   <= 1.5
    1920 Linears of 64 x 64      int8 1.40 to 1.52, int4 1.17 to 1.38, nvfp4 1.25 to 1.43   <= 1.5

What is above 1.5 is the checksum, and for nvfp4 the scales: 100 MB beside the 402 of the weights,
which "load" does not copy.

Of the 96 ms for 402 MB with int8, 39 are ``load_state_dict``, 17 the checksum, 14 conversion.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from common import Figure, cpu_seconds, environment, parser, report
from safetensors.torch import load_file
from torch import nn

import bittern as bt
from bittern.convert import plan_of
from bittern.toolkit import default_toolkit

RECIPES = ("int8", "int4", "nvfp4")
REPEATS = 5


def stack(count: int, width: int, *, value: float = 0.0) -> nn.Sequential:
    """Return a stack of Linears without spending time on random weights."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(count)])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)  # the memory is there before anybody's clock runs
    return model.eval()


def measure(recipe: str, count: int, width: int) -> tuple[float, float, float]:
    """Return the CPU seconds of restore, of loading alone, and of converting alone."""
    toolkit = default_toolkit()
    source = stack(count, width, value=1 / width)
    bt.quantize(source, recipe, [torch.ones(1, width)])
    plan = plan_of(source)
    seconds: dict[str, list[float]] = {"restore": [], "load": [], "convert": []}
    with tempfile.TemporaryDirectory() as folder:
        bt.save(source, Path(folder) / "state")
        file = Path(folder) / "state" / "state.safetensors"
        for _ in range(REPEATS):
            model = stack(count, width)
            seconds["restore"].append(cpu_seconds(partial(bt.restore, model, file.parent)))
            model = stack(count, width)
            seconds["convert"].append(cpu_seconds(partial(toolkit.convert, model, plan)))
            model = stack(count, width)
            names = model.state_dict().keys()
            seconds["load"].append(cpu_seconds(partial(load, model, file, names)))
    return min(seconds["restore"]), min(seconds["load"]), min(seconds["convert"])


def load(model: nn.Module, file: Path, names: Iterable[str]) -> None:
    """Load a model's own tensors from the file of its quantized twin."""
    tensors = load_file(file)
    model.load_state_dict({name: tensors[name] for name in names})


def main() -> None:
    options = parser(__doc__).parse_args()
    about = environment()
    torch.set_num_threads(1)
    figures = []
    for recipe in RECIPES:
        for count, width in ((96, 1024), (1920, 64)):
            restored, loaded, converted = measure(recipe, count, width)
            what = f"{recipe}, {count} Linears of {width} x {width}"
            figures += [
                Figure(f"{what}: restore", restored * 1000, "ms"),
                Figure(f"{what}: load alone", loaded * 1000, "ms"),
                Figure(f"{what}: convert alone", converted * 1000, "ms"),
                Figure(
                    f"{what}: restore / (load + convert)",
                    restored / (loaded + converted),
                    "x",
                    goal=1.5,
                    note=f"{restored / loaded:.1f} x load alone; ModelOpt 10 x",
                ),
            ]
    report("Restore", figures, json_path=options.json, about=about)


if __name__ == "__main__":
    main()
