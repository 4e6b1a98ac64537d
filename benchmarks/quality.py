"""What each recipe costs in perplexity, as a table.

    python benchmarks/quality.py MODEL CALIB.npy EVAL.npy [RECIPE ...] [--device cuda] [--rows N]
        [--variants plain outliers inner] [--seeds 3] [--json FILE]

MODEL is a directory that transformers loads; the files hold token ids, rows x length. Recipes are
calibrated on the first 128 rows of CALIB and measured on all rows of EVAL, in float32, heads and
embeddings as they are. A recipe is a name, or JSON such as
'{"extends": "int4", "algorithm": "mse"}'; without one, all that quantize linears of a language
model are run. Every recipe is run on several variants of the model, which compute the same
unquantized:

    plain       as it is
    outliers    every 48th gain of a layer's norms times 30, the columns that read it divided by 30
    inner       every 48th row of up_proj and v_proj times 30, the columns of down_proj and o_proj
                that read it divided by 30: outliers that no norm can take up

A recipe with a step that draws random numbers is run with several seeds; mean and spread are shown.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bittern as bt
from bittern.registry.targets import bound
from bittern.toolkit import default_toolkit

SKIPPED = ("base", "int8-cnn")  # of nothing, and of convolutions
VARIANTS = ("plain", "outliers", "inner")
EVERY, FACTOR = 48, 30


def load(path: str, device: str, *, variant: str = "plain") -> nn.Module:
    """Return the model in float32, with outlier channels if asked for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    if variant != "plain":
        for layer in model.model.layers:
            plant(layer, variant)
    return model


@torch.no_grad()
def plant(layer: Any, variant: str) -> None:
    """Give a Llama layer outliers, and change nothing of what it computes."""
    attention, mlp = layer.self_attn, layer.mlp
    if variant == "outliers":
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[::EVERY] *= FACTOR
            for linear in readers:
                linear.weight[:, ::EVERY] /= FACTOR
        return
    mlp.up_proj.weight[::EVERY] *= FACTOR
    mlp.down_proj.weight[:, ::EVERY] /= FACTOR
    heads = attention.o_proj.in_features // attention.v_proj.out_features
    width = attention.head_dim
    rows = torch.arange(0, attention.v_proj.out_features, EVERY)
    attention.v_proj.weight[rows] *= FACTOR
    for head in range(heads):  # the query heads that read one head of the values
        columns = (rows // width * heads + head) * width + rows % width
        attention.o_proj.weight[:, columns] /= FACTOR


def batches(path: str, device: str, rows: int | None) -> list[dict[str, Tensor]]:
    """Return the rows of a file in batches of 16."""
    ids = torch.tensor(np.load(path)[:rows].astype(np.int64), device=device)
    return [{"input_ids": part} for part in ids.split(16)]


def seeded(recipe: Any, seed: int) -> tuple[list[str], bool]:
    """Return the overrides that give a recipe's random steps a seed, and whether there are any."""
    toolkit = default_toolkit()
    algorithms = toolkit.registry.algorithms
    overrides = []
    for index, step in enumerate(toolkit.recipe(recipe).algorithm):
        function = bound(algorithms.get(step.name).run, plugin=algorithms.plugin(step.name))
        if "seed" in inspect.signature(function).parameters:
            overrides.append(f"algorithm.{index}.options.seed={seed}")
    return overrides, bool(overrides)


def measure(recipe: Any, variant: str, args: argparse.Namespace, data: Any) -> dict[str, Any]:
    """Return what a recipe costs on one variant, over the seeds."""
    calibration, held_out, plain = data
    perplexities, seconds, bits = [], [], 0.0
    for seed in range(args.seeds):
        overrides, random = seeded(recipe, seed)
        model = load(args.model, args.device, variant=variant)
        start = time.perf_counter()
        result = bt.quantize(model, recipe, data=calibration, overrides=overrides)
        seconds.append(time.perf_counter() - start)
        bits = result.plan.effective_bits
        perplexities.append(bt.evaluate(model, held_out, reference=False, layers=False).perplexity)
        if not random:
            break
    changes = [100 * (p / plain - 1) for p in perplexities]
    return {
        "recipe": recipe,
        "variant": variant,
        "bits": bits,
        "perplexity": perplexities,
        "percent": mean(changes),
        "spread": max(changes) - min(changes),
        "seconds": mean(seconds),
    }


def shown(found: dict[str, Any]) -> str:
    """Return a figure for the table."""
    spread = f" ± {found['spread'] / 2:.2f}" if len(found["perplexity"]) > 1 else ""
    return f"{found['percent']:+.2f}{spread}"


def main() -> None:
    """Print the table, one line per recipe as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("eval")
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="evaluation rows; all by default")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain", "outliers"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of recipes that are random")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_intermixed_args()
    shipped = [name for name in default_toolkit().registry.recipes if name not in SKIPPED]
    held_out = batches(args.eval, args.device, args.rows)
    calibration = batches(args.calib, args.device, args.calibration_rows)
    model = load(args.model, args.device)
    plain = bt.evaluate(model, held_out, reference=False, layers=False).perplexity
    print(f"unquantized: {plain:.4f}; change of the perplexity in percent\n")
    print(f"| recipe | bits | {' | '.join(args.variants)} | seconds |")
    print(f"|---|---|{'---|' * len(args.variants)}---|", flush=True)
    figures = []
    for text in args.recipes or shipped:
        recipe: Any = json.loads(text) if text.startswith("{") else text
        found = [
            measure(recipe, variant, args, (calibration, held_out, plain))
            for variant in args.variants
        ]
        figures += found
        cells = " | ".join(map(shown, found))
        seconds = mean(f["seconds"] for f in found)
        print(f"| {text} | {found[0]['bits']:.2f} | {cells} | {seconds:.1f} |", flush=True)
    if args.json is not None:
        about = {"unquantized": plain, "rows": sum(len(b["input_ids"]) for b in held_out)}
        args.json.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
