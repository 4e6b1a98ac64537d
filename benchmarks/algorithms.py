"""What every algorithm costs against plain forward passes over the same data, on a GPU or a CPU.

    python benchmarks/algorithms.py --device cuda [--json FILE]     # 1.1 B parameters, < 4 minutes
    python benchmarks/algorithms.py [--json FILE]                   # 16 M parameters, one thread
    python benchmarks/algorithms.py --only int4-awq --profile 25    # where the time goes

A Llama with random weights (transformers). ``--size large``, the default on a GPU: 16 layers of
2048, MLP 8192, 32 heads over 8, bfloat16, 64 x 512 tokens in batches of 8. ``--size small``: 4
layers of 512, float32, 16 x 128 tokens one by one. ``quantize`` is all of it: plan, convert,
weights, data passes, searches. Each figure is the second of two runs on fresh models (of the slow
recipes the only one), the device being waited for before and after; plain passes are taken before
and after, and the fewest seconds count. On a CPU they are CPU seconds. Memory is what the peak of
``quantize`` lies above that of the plain passes, as a share of the weights.

ModelOpt 0.47 with the large model on an H200 (plain 0.17 s): 4.8 to 5.0 x for FP8, INT8 and NVFP4,
11.5 x for SmoothQuant, 56 x and 88 x for INT4 and NVFP4 AWQ, 0.85 s for INT4 without data.

Measured on a CPU (AMD EPYC, 2 shared cores, torch 2.13), the small model: fp8 1.10, int8 1.09,
nvfp4 1.22, int8-smoothquant 2.6, int4-awq 6.4, nvfp4-awq 10.2 x the plain passes; without data
22 to 32 ms; int4-hqq 2.0 s, int4-gptq 3.9 s. On a GPU not yet.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Figure, environment, parser, report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bittern as bt
from bittern.toolkit import default_toolkit

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Size:
    """A model and its data."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    dtype: torch.dtype
    samples: int
    tokens: int
    batch: int


@dataclass(frozen=True)
class Row:
    """A recipe.

    Attributes:
        goal: Multiple of the plain passes, or milliseconds where there is no data.
        data: Whether it is given data.
        runs: How often it is run.
    """

    recipe: str
    goal: float | None = None
    data: bool = True
    runs: int = 2


SIZES = {
    "small": Size(512, 1408, 4, 8, 4, 8192, torch.float32, 16, 128, 1),
    "large": Size(2048, 8192, 16, 32, 8, 32000, torch.bfloat16, 64, 512, 8),
}
ROWS = (
    Row("fp8", 1.15),
    Row("int8", 1.15),
    Row("nvfp4", 1.15),
    Row("int8-smoothquant", 1.3),
    *(Row(name, 50.0, data=False) for name in ("int4", "int8-weight-only", "fp8-dynamic", "mxfp8")),
    Row("int4-awq", 6.0),
    Row("nvfp4-awq", 6.0),
    Row("int4-hqq", data=False, runs=1),
    Row("int4-gptq", runs=1),
)
AT_MAX = ("fp8", "int8", "nvfp4")


class Bench:
    """The model, its data, and the clock of the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.groups,
            vocab_size=size.vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            use_cache=False,
        )
        with device:
            self.model: nn.Module = LlamaForCausalLM(config).to(size.dtype).eval()
            ids = torch.randint(size.vocabulary, (size.samples, size.tokens))
        self.data: Batches = [{"input_ids": part} for part in ids.split(size.batch)]
        self.bytes = sum(p.nbytes for p in self.model.parameters())

    def fresh(self) -> nn.Module:
        """Return a copy of the model that has run once."""
        model = copy.deepcopy(self.model)
        self.passes(model, self.data[:1])
        return model

    def passes(self, model: nn.Module, data: Batches) -> None:
        """Run plain forward passes."""
        with torch.no_grad():
            for batch in data:
                model(**batch)

    def seconds(self, function: Callable[[], object]) -> tuple[float, int]:
        """Return the seconds of a call, and the bytes of its peak beyond what was there before."""
        gc.collect()
        if self.device.type != "cuda":
            start = time.process_time()
            function()
            return time.process_time() - start, 0
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        spent = time.perf_counter() - start
        return spent, torch.cuda.max_memory_allocated() - before

    def plain(self) -> tuple[float, int]:
        """Return the fewest seconds of the plain passes over all data, and their peak."""
        runs = [self.seconds(lambda: self.passes(self.model, self.data)) for _ in range(3)]
        return min(runs)

    def quantize(self, row: Row) -> tuple[list[float], int]:
        """Return the seconds of each run on a fresh model, and the peak of the last one."""
        spent, peak, data = [], 0, self.data if row.data else None
        for _ in range(row.runs):
            model = self.fresh()
            seconds, peak = self.seconds(lambda m=model: bt.quantize(m, row.recipe, data))
            spent.append(seconds)
            del model
        return spent, peak

    def profile(self, row: Row, lines: int) -> None:
        """Print which operators the second of two runs spends its time in."""
        data = self.data if row.data else None
        bt.quantize(self.fresh(), row.recipe, data)
        model = self.fresh()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=activities) as found:
            bt.quantize(model, row.recipe, data)
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        print(found.key_averages().table(sort_by=order, row_limit=lines), file=sys.stderr)


def steps_before(bench: Bench) -> list[Figure]:
    """Return what planning and conversion take."""
    toolkit = default_toolkit()
    times: dict[str, list[float]] = {"plan": [], "convert": []}
    for _ in range(3):
        model = bench.fresh()
        times["plan"].append(bench.seconds(lambda m=model: toolkit.plan(m, "int8"))[0])
        plan = toolkit.plan(model, "int8")
        convert = bench.seconds(lambda m=model, p=plan: toolkit.convert(m, p))[0]
        times["convert"].append(convert)
    count = sum(entry.kind == "weight" for entry in plan.entries)
    goals = {"plan": None, "convert": 30.0 if count == 112 else None}
    return [
        Figure(f"int8: {name} alone", 1e3 * min(found), "ms", goals[name], f"{count} linears")
        for name, found in times.items()
    ]


def measured(bench: Bench, row: Row, plain: tuple[float, int]) -> list[Figure]:
    """Return the figures of a recipe; that it failed is one, too."""
    try:
        runs, peak = bench.quantize(row)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return [Figure(f"{row.recipe}: failed", float("nan"), "s", None, str(error)[:200])]
    seconds = runs[-1]
    said = f"{seconds:.3f} s; {', '.join(f'{s:.3f}' for s in runs)}"
    extra = max(0, peak - (plain[1] if row.data else 0)) / bench.bytes
    if bench.device.type == "cuda":
        said += f"; peak {extra:+.1%} of the weights"
    if row.goal is None:
        found = [Figure(f"{row.recipe}: quantize", seconds, "s", None, said)]
    elif row.data:
        name = f"{row.recipe}: quantize / plain passes"
        found = [Figure(name, seconds / plain[0], "x", row.goal, said)]
    else:
        found = [Figure(f"{row.recipe}: quantize, no data", 1e3 * seconds, "ms", row.goal, said)]
    if row.recipe in AT_MAX and bench.device.type == "cuda":
        found.append(
            Figure(f"{row.recipe}: peak beyond plain passes", 100 * extra, "% of weights", 2.0)
        )
    return found


def main() -> None:
    """Print the table; each figure goes to stderr as soon as it is known."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--size", choices=list(SIZES), help="by default that of the device")
    options.add_argument("--only", nargs="+", metavar="RECIPE", help="some of the recipes")
    options.add_argument("--profile", type=int, metavar="LINES", help="print operators instead")
    options.add_argument("--seconds", type=float, default=200, help="begin no recipe after these")
    options.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = options.parse_args()
    start, device = time.perf_counter(), torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    size = args.size or ("large" if device.type == "cuda" else "small")
    bench = Bench(SIZES[size], device)
    rows = [row for row in ROWS if args.only is None or row.recipe in args.only]
    if args.profile:
        for row in rows:
            bench.profile(row, args.profile)
        return
    about = environment(size=size, device=str(device), threads=args.threads)
    about["plugins"] = [r.label for r in default_toolkit().plugins.records if r.active]
    about["parameters"] = sum(p.numel() for p in bench.model.parameters())
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    bench.passes(bench.model, bench.data)
    plain = bench.plain()
    figures = steps_before(bench)
    for row in rows:
        if time.perf_counter() - start > args.seconds:
            found = [Figure(f"{row.recipe}: not run", float("nan"), "s", None, "out of time")]
        else:
            found = measured(bench, row, plain)
        for figure in found:
            print(f"{figure.what}: {figure.value:.3g} {figure.unit} {figure.note}", file=sys.stderr)
        figures += found
    again = bench.plain()
    note = f"before; {again[0]:.3f} after all others"
    figures.insert(0, Figure("plain passes", plain[0], "s", None, note))
    title = f"Algorithms, {about['parameters'] / 1e6:.0f} M parameters, {about.get('gpu', 'CPU')}"
    report(title, figures, json_path=args.json, about=about)


if __name__ == "__main__":
    main()
