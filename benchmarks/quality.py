"""What each recipe costs in perplexity: the tables of the README.

    python benchmarks/quality.py MODEL CALIB.npy EVAL.npy [RECIPE ...] [--device cuda] [--rows N]

MODEL is a directory that transformers loads; the files hold token ids, rows x length. Every recipe
is run on the model as it is, and on the same model with planted outliers, which change nothing
unquantized: every 48th gain of a layer's norms times 30, the columns that read it divided by 30. A
recipe is a name, or JSON such as '{"extends": "int4", "algorithm": "mse"}'.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bittern as bt

RECIPES = (
    *("int8", "int8-smoothquant", "int8-weight-only", "int4", "fp8", "fp8-dynamic", "fp8-block"),
    *("w4a8", "nvfp4", "nvfp4a16", "mxfp8", "mxfp6", "mxfp4", "mxint8", "nf4"),
)


def load(path: str, device: str, *, outliers: bool) -> nn.Module:
    """Return the model in float32, with outlier channels if asked for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    for layer in model.model.layers if outliers else ():
        attention, mlp = layer.self_attn, layer.mlp
        with torch.no_grad():
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[::48] *= 30
                for linear in readers:
                    linear.weight[:, ::48] /= 30
    return model


def batches(path: str, device: str, rows: int | None) -> list[dict[str, Tensor]]:
    """Return the rows of a file in batches of 16."""
    ids = torch.tensor(np.load(path)[:rows].astype(np.int64), device=device)
    return [{"input_ids": part} for part in ids.split(16)]


def main() -> None:
    """Print one line per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("eval")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="evaluation rows; all by default")
    args = parser.parse_intermixed_args()
    calibration = batches(args.calib, args.device, 128)
    held_out = batches(args.eval, args.device, args.rows)
    plain = bt.evaluate(load(args.model, args.device, outliers=False), held_out).perplexity
    print(f"unquantized: {plain:.4f}")
    for text in args.recipes:
        recipe: Any = json.loads(text) if text.startswith("{") else text
        changes = []
        for outliers in (False, True):
            model = load(args.model, args.device, outliers=outliers)
            bits = bt.quantize(model, recipe, data=calibration).plan.effective_bits
            found = bt.evaluate(model, held_out).perplexity
            changes.append(f"{found:.4f} {100 * (found / plain - 1):+.2f}%")
        print(f"{text}: {bits:.2f} bits, {changes[0]}, with outliers {changes[1]}", flush=True)


if __name__ == "__main__":
    main()
