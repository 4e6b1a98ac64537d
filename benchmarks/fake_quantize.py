"""Fake quantization on the CPU: core's reference, the kernels plugin, and the floor.

    python benchmarks/fake_quantize.py [--shape ROWSxCOLUMNS] [--json FILE]

The floor is what copying takes: the bytes read and written at the bandwidth with which one thread
copies 256 MiB. CPU seconds of one thread; inputs are rotated so that none is in the cache when its
turn comes. ``clone`` is a copy into fresh memory: what any function that returns a new tensor pays.
Every result of the kernel is compared with the reference, bit for bit.

Measured (AMD EPYC, 2 shared cores, torch 2.13 CPU, copy 17.9 GB/s), multiples of the floor:

    2048x4096           bfloat16             float32
                        reference  kernel    reference  kernel    goal
    clone                   0.8                  5.6
    int8 per tensor        27.3      3.5         7.2      6.5     <= 3
    int8 per channel       17.3      3.8         7.1      6.6     <= 3
    int4 groups of 128     27.8      3.8         7.3      6.6     <= 3
    fp8 per tensor         50.0      5.3        18.5      7.3     <= 3
    fp8 per token, dynamic 41.8      7.4        24.6      8.3     <= 3

In float32 the page faults of the fresh 32 MiB output are most of it. With transparent huge pages
(``THP_MEM_ALLOC_ENABLE=1``, read by torch) clone is 1.6, int8 per tensor 3.2 and 2.3, fp8 per
tensor 15.6 and 3.3; bfloat16, whose output is small enough for malloc to reuse, loses a little.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from common import Figure, cpu_seconds, environment, parser, report
from torch import Tensor

import bittern
from bittern.numerics import Scales, amax, scales_from_amax
from bittern.numerics import fake_quantize as reference
from bittern.records import Granularity, PerChannel, PerGroup, PerTensor, PerToken, QuantizerSpec
from bittern_kernels import cpu

COPIED = 256 * 2**20
ROTATED = 4
GOAL = 3.0
# Format, granularity, whether the scales are computed from the tensor.
OPERATIONS: tuple[tuple[str, Granularity, bool], ...] = (
    ("int8", PerTensor(), False),
    ("int8", PerChannel(0), False),
    ("int4", PerGroup(128), False),
    ("fp8", PerTensor(), False),
    ("fp8", PerChannel(0), False),
    ("fp8", PerToken(), True),
)


def rotating(
    function: Callable[[Tensor], object], inputs: list[Tensor], *, rounds: int = 3
) -> float:
    """Return the fewest CPU seconds of a call over inputs in rotation."""
    for x in inputs:
        function(x)
    turns = itertools.islice(itertools.cycle(inputs), rounds * len(inputs))
    return min(cpu_seconds(partial(function, x)) for x in turns)


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of copying in one thread."""
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / rotating(target.copy_, [source], rounds=7)


def same(x: Tensor, spec: QuantizerSpec, scales: Scales | None) -> bool:
    """Whether kernel and reference agree bit for bit."""
    found, wanted = cpu.fake_quantize(x, spec, scales), reference(x, spec, scales)
    return found is None or torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", default="2048x4096")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    about = environment(threads=1, shape=args.shape)
    rows, columns = (int(n) for n in args.shape.split("x"))
    formats = bittern.Toolkit(block=["*"]).registry.formats
    bandwidth = copy_bandwidth()
    figures = [Figure("copy bandwidth of one thread", bandwidth / 1e9, "GB/s")]
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        inputs = [torch.randn(rows, columns).to(dtype) for _ in range(ROTATED)]
        short = str(dtype).removeprefix("torch.")
        floor = 2 * inputs[0].nbytes / bandwidth
        clone = rotating(torch.clone, inputs)
        figures.append(Figure(f"{short}: floor", floor * 1e3, "ms"))
        figures.append(Figure(f"{short}: clone / floor", clone / floor, "x"))
        for name, granularity, dynamic in OPERATIONS:
            spec = QuantizerSpec(formats.get(name), granularity, dynamic)
            scales = None if dynamic else scales_from_amax(amax(inputs[0], granularity), spec)
            plain = rotating(partial(reference, spec=spec, scales=scales), inputs)
            label = f"{short} {spec}"
            figures.append(Figure(f"{label}: reference / floor", plain / floor, "x"))
            if cpu.fake_quantize(inputs[0], spec, scales) is None:
                figures.append(Figure(f"{label}: kernel declines", plain / floor, "x", GOAL))
                continue
            kernel = rotating(partial(cpu.fake_quantize, spec=spec, scales=scales), inputs)
            note = f"{kernel * 1e3:.1f} ms, reference {plain * 1e3:.1f} ms: "
            note += f"{plain / kernel:.1f} x faster, "
            note += "bits equal" if same(inputs[0], spec, scales) else "BITS DIFFER"
            figures.append(Figure(f"{label}: kernel / floor", kernel / floor, "x", GOAL, note))
    report(f"Fake quantization, {args.shape}", figures, json_path=args.json, about=about)


if __name__ == "__main__":
    main()
