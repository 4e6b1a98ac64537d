"""What packed weights take, and cost: bytes against the plan's promise, time of a forward pass.

    python benchmarks/compress.py [--size N] [--json FILE]

Four Linears without biases, weights only, CPU seconds of one thread. "Uncached" rounds the weights
in every pass, as training does; "cached" keeps the rounded copy of frozen weights, which takes the
memory of the original once more; "packed" unpacks in every pass, and keeps nothing.
"""

from __future__ import annotations

import torch
from common import Figure, best, environment, parser, report
from torch import nn

import bittern as bt
from bittern.modes.compress import stored_bytes

FORMATS = ("int8", "int4", "int4-asym", "int6", "fp8", "nvfp4", "mxfp4", "mxfp6", "mxfp8", "nf4")
ROWS = (1, 64)


def measure(number_format: str, size: int) -> list[Figure]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(4)]).eval()
    before = stored_bytes(model)
    plan = bt.quantize(model, {"rules": [{"match": "*", "weight": number_format}]}).plan
    inputs = [torch.randn(rows, size) for rows in ROWS]
    with torch.no_grad():
        uncached = [best(lambda x=x: model(x)) for x in inputs]
        model.requires_grad_(False)
        cached = [best(lambda x=x: model(x)) for x in inputs]
        bt.compress(model)
        packed = [best(lambda x=x: model(x)) for x in inputs]
    size_note = f"{before / stored_bytes(model):.1f} x smaller"
    found = [
        Figure(
            f"{number_format}: bytes / what the plan promised",
            stored_bytes(model) / plan.bytes_after,
            "x",
            1.001,
            size_note,
        )
    ]
    for rows, slow, fast, seconds in zip(ROWS, uncached, cached, packed, strict=True):
        found.append(
            Figure(
                f"{number_format}: forward of {rows} rows, packed / uncached",
                seconds / slow,
                "x",
                note=f"{seconds * 1e3:.1f}, {slow * 1e3:.1f}, cached {fast * 1e3:.1f} ms",
            )
        )
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--size", type=int, default=1024, help="width of the Linears")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    about = environment(threads=1, size=args.size)
    figures = [figure for name in FORMATS for figure in measure(name, args.size)]
    report("Packed weights", figures, json_path=args.json, about=about)


if __name__ == "__main__":
    main()
