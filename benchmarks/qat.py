"""What training brings back of the perplexity that quantization costs.

    python benchmarks/qat.py MODEL CALIB.npy EVAL.npy [RECIPE ...] [--steps 300] [--outliers]
        [--weights follow] [--activations fixed] [--device cuda] [--rows N] [--json]

MODEL is a directory that transformers loads; the files hold token ids, rows x length, and only
CALIB is ever trained on. Every recipe is applied to a fresh model, calibrated on 128 rows, measured
(PTQ), trained with distillation from the unquantized model (logits and hidden states), and measured
again (QAT). Batches are windows of the text that begin anywhere, drawn by a seed; AdamW, 5 % warmup
and a cosine to 0. ``--unquantized`` trains the plain model by the same schedule on next tokens:
what the text alone brings, which is no merit of training while quantized.

The defaults are the best of some forty runs of 300 steps on nvfp4. Batches of 8, 16 and 32 rows
bring back 42, 44 and 47 % of what it costs, 64 no more; gains of norms that learn 30 times as fast,
49. What brought less: Muon (35 to 38), text that the teacher wrote (44), ranges of `mse` (45) or
`smooth` (46) to begin with, hidden states of every part or linear (41), a loss of next tokens (16).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from typing import Any

import torch
from quality import batches, load
from torch import Tensor, nn

import bittern as bt
from bittern.toolkit import default_toolkit
from bittern.training import Distillation, train_ranges

RECIPES = ("nvfp4", "int8", "int4")


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate: warmup, then a cosine to 0."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def draws(rows: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """Return batches of rows, each joined from windows of the text that begin anywhere."""
    stream, length = rows.flatten(), rows.shape[1] // args.pieces
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.steps, args.batch, args.pieces, 1)
    starts = torch.randint(len(stream) - length + 1, shape, generator=generator)
    return list(stream[(starts + torch.arange(length)).flatten(2).to(stream.device)])


def states(model: nn.Module, where: str) -> list[str]:
    """Return the modules whose outputs are compared."""
    layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    if where == "linears":
        kinds = [n for n, m in model.model.layers[0].named_modules() if isinstance(m, nn.Linear)]
        return [f"{layer}.{kind}" for layer in layers for kind in kinds]
    parts = ("self_attn", "mlp") if where == "parts" else ()
    return [*layers, *(f"{layer}.{part}" for layer in layers for part in parts)]


def train(student: nn.Module, teacher: nn.Module, rows: Tensor, args: argparse.Namespace) -> None:
    """Train a quantized model in place."""
    ranges = train_ranges(
        student, weights=args.weights, activations=args.activations, decay=args.decay
    )
    frozen = [p for n, p in student.named_parameters() if args.freeze and args.freeze in n]
    left_out = {id(p) for p in (*ranges.parameters(), *frozen)}
    others = [p for p in student.parameters() if id(p) not in left_out]
    for parameter in frozen:
        parameter.requires_grad_(False)
    matrices = [p for p in others if p.dim() > 1]
    gains = [p for p in others if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "lr": args.lr, "weight_decay": 0.0},
            {"params": gains, "lr": args.norm_lr, "weight_decay": 0.0},
            *ranges.parameter_groups(args.range_lr),
        ],
        betas=(0.9, args.beta2),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i, args.steps))
    student.train()
    with Distillation(
        student,
        teacher,
        hidden=states(student, args.hidden_at),
        temperature=args.temperature,
        hidden_weight=args.hidden,
        task_weight=args.task,
        adapter=default_toolkit().adapter(student),
    ) as distillation:
        for step, ids in enumerate(draws(rows, args)):
            optimizer.zero_grad()
            loss = distillation.loss({"input_ids": ids})
            loss.backward()
            nn.utils.clip_grad_norm_(others, 1.0)
            optimizer.step()
            scheduler.step()
            ranges.step()
            if args.verbose and step % 20 == 0:
                parts = {name: round(float(v), 5) for name, v in distillation.parts.items()}
                print(step, float(loss.detach()), parts, flush=True)
    ranges.finish()
    student.eval()


def unquantized(model: nn.Module, rows: Tensor, args: argparse.Namespace) -> None:
    """Train the plain model in place, on next tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i, args.steps))
    model.train()
    for ids in draws(rows, args):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()


def main() -> None:
    """Print one line per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("eval")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--norm-lr", type=float, default=9e-3, help="of vectors: gains of norms")
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--range-lr", type=float, default=1e-3, help="of learned ranges, relative")
    parser.add_argument(
        "--freeze", default="", help="part of the names of parameters to leave as is"
    )
    parser.add_argument("--pieces", type=int, default=1, help="places that a row is taken from")
    parser.add_argument("--weights", default="follow")
    parser.add_argument("--activations", default="fixed")
    parser.add_argument("--decay", type=float, default=0.99)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--hidden", type=float, default=10.0, help="weight of the hidden states")
    parser.add_argument("--hidden-at", choices=("blocks", "parts", "linears"), default="blocks")
    parser.add_argument("--task", type=float, default=0.0, help="weight of the next tokens")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--unquantized", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="evaluation rows; all by default")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_intermixed_args()
    calibration = batches(args.calib, args.device, None)
    rows = torch.cat([batch["input_ids"] for batch in calibration])
    held_out = batches(args.eval, args.device, args.rows)

    def measure(model: nn.Module) -> float:
        found = bt.evaluate(model, held_out, reference=False, layers=False).perplexity
        assert found is not None
        return found

    plain = load(args.model, args.device, variant="outliers" if args.outliers else "plain")
    base = measure(plain)
    if args.unquantized:
        model = copy.deepcopy(plain)
        unquantized(model, rows, args)
        print(f"unquantized: {base:.4f}, trained {100 * (measure(model) / base - 1):+.2f}%")
    for text in args.recipes:
        recipe: Any = json.loads(text) if text.startswith("{") else text
        start = time.perf_counter()
        model = copy.deepcopy(plain)
        bt.quantize(model, recipe, data=calibration[:8])
        before = measure(model)
        train(model, plain, rows, args)
        after = measure(model)
        line = {
            "recipe": recipe,
            "outliers": args.outliers,
            "weights": args.weights,
            "activations": args.activations,
            "steps": args.steps,
            "unquantized": base,
            "ptq_percent": 100 * (before / base - 1),
            "qat_percent": 100 * (after / base - 1),
            "seconds": time.perf_counter() - start,
        }
        if args.json:
            print(json.dumps(line), flush=True)
        else:
            print(
                f"{text}: unquantized {base:.4f}, PTQ {line['ptq_percent']:+.2f}%, "
                f"QAT {line['qat_percent']:+.2f}% ({args.steps} steps, weights {args.weights}, "
                f"activations {args.activations}, {line['seconds']:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
