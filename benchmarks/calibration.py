"""What calibration costs against plain forward passes over the same data.

    python benchmarks/calibration.py [--threads N] [--json FILE]

A Llama of 20 M parameters with random weights (transformers; hidden 512, 4 layers), float32. All
figures are CPU seconds, plain passes and ``quantize`` in turn, the best of several. ``quantize`` is
all of it: plan, convert, weights, data pass. ModelOpt 0.47 needs 1.5 times the plain pass for INT8
and 1.4 for FP8 (measured on another machine). The memory is that of a fresh process.

Measured (AMD EPYC, 2 shared cores, Python 3.11, torch 2.13 CPU, transformers 5.23):

    int8, 16 x 128 tokens: quantize / plain passes           1.07 x   <= 1.3 x
    int8, 16 x 512 tokens: quantize / plain passes           1.03 x   <= 1.3 x
    fp8, 16 x 128 tokens: quantize / plain passes            1.06 x   <= 1.3 x
    int8-weight-only / int4 / fp8-dynamic, no data: quantize 19 / 20 / 21 ms, no forward pass
    int8 / fp8, 128 tokens: quantized forward / plain        1.19 / 1.36 x
    int8: peak memory beyond plain passes                    0 MiB    <= 1.6 MiB
"""

from __future__ import annotations

import gc
import json
import resource
from collections.abc import Callable

import torch
from common import Figure, best, cpu_seconds, environment, fresh, parser, report
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bittern as bt
from bittern.toolkit import default_toolkit

SAMPLES = 16
VOCABULARY = 8192
Batches = list[dict[str, torch.Tensor]]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def batches(tokens: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    shape = (1, tokens)
    return [
        {"input_ids": torch.randint(VOCABULARY, shape, generator=generator)} for _ in range(SAMPLES)
    ]


def run(model: nn.Module, data: Batches) -> None:
    with torch.no_grad():
        for batch in data:
            model(**batch)


def in_turn(
    first: Callable[[], object], *others: Callable[[], object], repeats: int
) -> list[float]:
    """Return the fewest CPU seconds of each function, run in turn."""
    functions = (first, *others)
    for function in functions:
        function()
    runs = [[cpu_seconds(function) for function in functions] for _ in range(repeats)]
    return [min(column) for column in zip(*runs, strict=True)]


def calibrating(model: nn.Module, tokens: int, recipe: str, *, repeats: int = 5) -> Figure:
    """Return the time of ``quantize`` as a multiple of the plain passes."""
    data = batches(tokens)
    plain, quantize, revert = in_turn(
        lambda: run(model, data),
        lambda: bt.quantize(model, recipe, data),
        lambda: bt.revert(model),
        repeats=repeats,
    )
    return Figure(
        f"{recipe}, {SAMPLES} x {tokens} tokens: quantize / plain passes",
        quantize / plain,
        "x",
        1.3,
        f"{quantize:.3f} s against {plain:.3f} s; revert {revert * 1e3:.1f} ms",
    )


def without_data(model: nn.Module, recipe: str) -> Figure:
    """Return the time of ``quantize`` with a recipe that needs no data."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = model.register_forward_pre_hook(count)
    plain = best(lambda: run(model, batches(128)))
    passes = 0
    seconds, _ = in_turn(lambda: bt.quantize(model, recipe), lambda: bt.revert(model), repeats=7)
    handle.remove()
    note = f"{passes} forward passes; {seconds / plain:.2f} x 16 plain passes of 128 tokens"
    return Figure(f"{recipe}, no data: quantize", seconds * 1e3, "ms", 50.0, note)


def forward(model: nn.Module, recipe: str) -> Figure:
    """Return the time of a quantized forward pass as a multiple of a plain one."""
    data = batches(128)[:1]
    plain = best(lambda: run(model, data), repeats=15)
    bt.quantize(model, recipe, data)
    quantized = best(lambda: run(model, data), repeats=15)
    bt.revert(model)
    note = f"{quantized * 1e3:.1f} ms against {plain * 1e3:.1f} ms"
    return Figure(
        f"{recipe}, 128 tokens: quantized forward / plain", quantized / plain, "x", None, note
    )


def memory(recipe: str) -> dict[str, float]:
    """Return by how many MiB ``quantize`` raises the peak over plain passes, in this process."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    torch.set_num_threads(1)
    model, data = llama(), batches(512)
    bt.quantize(nn.Sequential(nn.Linear(8, 8)), "int8", [torch.ones(1, 8)])  # imports everything
    run(model, data)
    gc.collect()
    before = peak()
    bt.quantize(model, recipe, data)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"more": peak() - before, "model": size}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--memory", metavar="RECIPE", help="measure memory only, print JSON")
    args = arguments.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory)))
        return
    torch.set_num_threads(args.threads)
    about = environment(threads=args.threads)
    model = llama()
    about["plugins"] = [r.label for r in default_toolkit().plugins.records if r.active]
    about["parameters"] = sum(p.numel() for p in model.parameters())
    figures = [
        calibrating(model, 128, "int8"),
        calibrating(model, 512, "int8", repeats=3),
        calibrating(model, 128, "fp8"),
        *(without_data(model, name) for name in ("int8-weight-only", "int4", "fp8-dynamic")),
        *(forward(model, name) for name in ("int8", "fp8", "int8-weight-only")),
    ]
    used = fresh(__file__, "--memory", "int8")
    share = 0.02 * used["model"]
    note = f"2% of the weights ({used['model']:.0f} MiB), 16 x 512 tokens"
    figures.append(
        Figure("int8: peak memory beyond plain passes", used["more"], "MiB", share, note)
    )
    report("Calibration", figures, json_path=args.json, about=about)


if __name__ == "__main__":
    main()
