"""What quantizing costs per module: plan, convert, weights, and the overhead of a forward pass.

    python benchmarks/conversion.py [--json FILE]

Chains of small Linears with the recipe ``int8`` (a weight and an input quantizer each), CPU seconds
of one thread, the best of several models; the arithmetic of such a Linear costs next to nothing, so
that what is measured is the framework. ModelOpt 0.47: 2.1 to 2.3 ms to convert a Linear, 280 us for
a quantized layer (measured on another machine). "Weights folded" is how ``evaluate`` runs a model:
weights are quantized once.

Measured (AMD EPYC, 2 shared cores, Python 3.11, torch 2.13 CPU), per Linear:

    plan                              0.06 to 0.09 ms
    convert, 1000 / 3000 Linears      0.12 / 0.19 ms   <= 0.2 ms
    calibrate on one row              0.7 to 1.1 ms
    forward overhead, disabled        3.0 to 6.6 us
    forward overhead, quantized       52 us            <= 30 us
    forward overhead, weights folded  25 to 29 us      <= 30 us
"""

from __future__ import annotations

import gc

import torch
from common import Figure, best, cpu_seconds, environment, parser, report
from torch import nn

import bittern as bt
from bittern.evaluation.fold import folded_weights
from bittern.nn import quantizers_off
from bittern.toolkit import default_toolkit

COUNTS = (100, 1000, 3000)
RECIPE = "int8"
# State of a chain to the goal for its overhead per layer, in microseconds.
STATES = {"plain": None, "disabled": None, "quantized": 30.0, "weights folded": 30.0}


def chain(count: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)])


def convert_once(count: int) -> tuple[float, float, float, float]:
    """Return the CPU seconds of plan, convert, calibrate, revert on a fresh chain."""
    toolkit, model, data = default_toolkit(), chain(count), [torch.ones(1, 8)]
    gc.collect()
    with torch.no_grad():
        forward = cpu_seconds(lambda: model(data[0]))
    planning = cpu_seconds(lambda: toolkit.plan(model, RECIPE))
    plan = toolkit.plan(model, RECIPE)
    convert = cpu_seconds(lambda: toolkit.convert(model, plan))
    calibrate = cpu_seconds(lambda: toolkit.calibrate(model, plan, data)) - forward
    return planning, convert, calibrate, cpu_seconds(lambda: bt.revert(model))


def forwards(count: int, *, rounds: int = 7) -> dict[str, float]:
    """Return the CPU seconds of one forward pass of a chain in each state, states in turn."""
    plain, model, x = chain(count).eval(), chain(count).eval(), torch.randn(4, 8)
    bt.quantize(model, RECIPE, [x])
    found: dict[str, list[float]] = {name: [] for name in STATES}
    with torch.no_grad():
        for _ in range(rounds):
            found["plain"].append(best(lambda: plain(x), repeats=3))
            found["quantized"].append(best(lambda: model(x), repeats=3))
            with quantizers_off(model):
                found["disabled"].append(best(lambda: model(x), repeats=3))
            with folded_weights(model):
                found["weights folded"].append(best(lambda: model(x), repeats=3))
    return {name: min(seconds) for name, seconds in found.items()}


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    plugins = [record.label for record in default_toolkit().plugins.records if record.active]
    about = environment(threads=1, plugins=plugins)
    convert_once(10)  # plugins load, recipes are read
    figures = []
    for count in COUNTS:
        runs = [convert_once(count) for _ in range(5)]
        planning, convert, calibrate, revert = (min(run) for run in zip(*runs, strict=True))
        for what, seconds, goal in (
            ("plan", planning, None),
            ("convert", convert, 0.2),
            ("calibrate on one row", calibrate, None),
            ("revert", revert, None),
        ):
            name = f"{count} Linears: {what}, per Linear"
            figures.append(Figure(name, seconds / count * 1e3, "ms", goal, f"{seconds:.3f} s"))
    for count in COUNTS[:2]:
        seconds = forwards(count)
        note = f"{seconds['plain'] / count * 1e6:.1f} us plain"
        for state, goal in list(STATES.items())[1:]:
            more = (seconds[state] - seconds["plain"]) / count * 1e6
            name = f"{count} Linears: forward overhead, {state}, per layer"
            figures.append(Figure(name, more, "us", goal, note))
    report("Conversion", figures, json_path=args.json, about=about)


if __name__ == "__main__":
    main()
