"""Fake quantization and packing on the CPU, as multiples of what copying the bytes takes.

    python benchmarks/fake_quantize.py [--shape ROWSxCOLUMNS] [--dtype bfloat16] [--compile]
                                       [--json FILE]

The floor is the bytes that an operation must read and write, the input once, at the bandwidth with
which one thread copies 256 MiB just before. Median CPU seconds of one thread; inputs are rotated so
that none is in the cache when its turn comes. ``--compile`` adds the backend of bittern-kernels.
``tiny`` is one call on 16x64 float32, where Python dominates.

Measured (AMD EPYC, 2 shared cores under load, torch 2.13 CPU, copy about 19 GB/s), multiples of the
floor at 2048x4096 bfloat16, 1.7 to 2.0 ms; before, every operation ran over the whole tensor:

                           before   core   compiled   goal
    int8 per tensor          28      3.9      1.8     10, compiled 3
    int8 per channel         28      4.2      1.7     10, compiled 3
    int4 groups of 128        8      5.0      1.7     10, compiled 3
    fp8 per tensor           51      6.3      5.4     10, compiled 3
    fp8 per token, dynamic           9.1      8.1     10, compiled 3
    nvfp4, dynamic                    17
    mxfp8, mxfp4, dynamic         13, 12
    nf4, dynamic                     122
    quantize and pack fp8             13
    quantize and pack int4            18
    quantize and pack nvfp4           47              40
    quantize and pack mxfp4           37

Under more load, core gets up to 1.5 times slower. One call on 16x64 float32 takes what it took
before: 17, 20, 42, 26 us for the first four rows (22, 18, 45, 35).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial

import torch
from common import Figure, cpu_seconds, environment, parser, report
from torch import Tensor

import bittern
from bittern.numerics import (
    Quantized,
    Scales,
    fake_quantize,
    measure,
    quantize,
    scales_for,
)
from bittern.numerics.packing import pack_nibbles
from bittern.numerics.stored import e4m3_scales, e8m0_bytes
from bittern.records import Granularity, PerChannel, PerGroup, PerTensor, PerToken, QuantizerSpec

COPIED = 256 * 2**20
ROTATED = 4
TINY = (16, 64)
# Format, granularity, whether the scales are computed from the tensor, the goal.
FAKE: tuple[tuple[str, Granularity, bool, float | None], ...] = (
    ("int8", PerTensor(), False, 10.0),
    ("int8", PerChannel(0), False, 10.0),
    ("int4", PerGroup(128), False, 10.0),
    ("fp8", PerTensor(), False, 10.0),
    ("fp8", PerToken(), True, 10.0),
    ("nvfp4", PerGroup(16), True, None),
    ("mxfp8", PerGroup(32), True, None),
    ("mxfp4", PerGroup(32), True, None),
    ("nf4", PerGroup(64), True, None),
)
PACK: tuple[tuple[str, Granularity, float | None], ...] = (
    ("fp8", PerTensor(), None),
    ("int4", PerGroup(128), None),
    ("nvfp4", PerGroup(16), 40.0),
    ("mxfp4", PerGroup(32), None),
)


def rotating(
    function: Callable[[Tensor], object], inputs: list[Tensor], *, rounds: int = 3
) -> float:
    """Return the median CPU seconds of a call over inputs in rotation."""
    for x in inputs:
        function(x)
    turns = itertools.islice(itertools.cycle(inputs), rounds * len(inputs))
    return statistics.median(cpu_seconds(partial(function, x)) for x in turns)


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of copying in one thread."""
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / rotating(target.copy_, [source], rounds=9)


def multiple(
    label: str,
    function: Callable[[Tensor], object],
    inputs: list[Tensor],
    *,
    moved: int,
    goal: float | None = None,
    note: str = "",
) -> Figure:
    """Return the time of a function as a multiple of copying ``moved`` bytes, read and written."""
    floor = moved / copy_bandwidth()
    seconds = rotating(function, inputs)
    text = f"{1e3 * seconds:.1f} ms, floor {1e3 * floor:.2f} ms{note}"
    return Figure(label, seconds / floor, "x", goal, text)


def packed(x: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """Quantize to what a checkpoint holds: packed codes and stored scales."""
    found: Quantized = quantize(x, spec)
    codes = found.codes if spec.format.bits == 8 else pack_nibbles(found.codes)
    if spec.format.scale_bits == 32:
        return codes, found.scales.scale
    stored = e4m3_scales if spec.format.name.startswith("nvfp4") else e8m0_bytes
    return codes, stored(found.scales.scale)


def same(a: Tensor, b: Tensor) -> bool:
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(bits), b.view(bits))


def tiny(spec: QuantizerSpec, *, dynamic: bool, calls: int = 300) -> float:
    """Return the CPU seconds of one call on a tiny tensor."""
    x = torch.randn(TINY)
    scales = None if dynamic else scales_for(measure(x, spec), spec)

    def run(_: Tensor) -> None:
        for _ in range(calls):
            fake_quantize(x, spec, scales)

    return rotating(run, [x], rounds=5) / calls


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", default="2048x4096")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--compile", action="store_true", help="add the backend 'compile'")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    about = environment(threads=1, shape=args.shape, dtype=args.dtype)
    rows, columns = (int(n) for n in args.shape.split("x"))
    formats = bittern.Toolkit(block=["*"]).registry.formats
    torch.manual_seed(0)
    inputs = [torch.randn(rows, columns).to(getattr(torch, args.dtype)) for _ in range(ROTATED)]
    read = inputs[0].nbytes
    figures = [multiple("clone", torch.clone, inputs, moved=2 * read)]
    for name, granularity, dynamic, goal in FAKE:
        spec = QuantizerSpec(formats.get(name), granularity, dynamic)
        scales = None if dynamic else scales_for(measure(inputs[0], spec), spec)
        run = partial(fake_quantize, spec=spec, scales=scales)
        note = f"; tiny {1e6 * tiny(spec, dynamic=dynamic):.0f} us"
        label = f"fake_quantize {spec}"
        figures.append(multiple(label, run, inputs, moved=2 * read, goal=goal, note=note))
        if args.compile:
            figures += compiled(spec, scales, inputs)
    for name, granularity, goal in PACK:
        spec = QuantizerSpec(formats.get(name), granularity, dynamic=True)
        run = partial(packed, spec=spec)
        moved = read + sum(part.nbytes for part in run(inputs[0]))
        figures.append(multiple(f"quantize and pack {spec}", run, inputs, moved=moved, goal=goal))
    report(
        f"Fake quantization, {args.shape} {args.dtype}", figures, json_path=args.json, about=about
    )


def compiled(spec: QuantizerSpec, scales: Scales | None, inputs: list[Tensor]) -> list[Figure]:
    """Return the figure of the compiled backend, where it has the format."""
    from bittern_kernels.compiled import fake_quantize as kernel
    from bittern_kernels.hooks import FORMATS

    if spec.format.name not in FORMATS:
        return []
    run = partial(kernel, spec=spec, scales=scales)
    equal = same(run(inputs[0]), fake_quantize(inputs[0], spec, scales))
    note = "; bits equal" if equal else "; BITS DIFFER"
    moved = 2 * inputs[0].nbytes
    return [multiple(f"compiled {spec}", run, inputs, moved=moved, goal=3.0, note=note)]


if __name__ == "__main__":
    main()
