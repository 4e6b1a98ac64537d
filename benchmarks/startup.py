"""What starting costs: imports against ``import torch``, and ``bittern --help``.

    python benchmarks/startup.py [--repeats N] [--json FILE]

Every case runs in a fresh interpreter, the cases in turn; the figures are the best of the repeats.
``import bittern`` is lazy, so the honest figures are the later ones: a Toolkit with every plugin
loaded and every table collected, everything that ``quantize`` imports, and a first ``quantize``.

Measured (AMD EPYC, 2 shared cores, Python 3.11, torch 2.13 CPU, transformers 5.23):

    import bittern: CPU time / import torch                       0.019 x   <= 1.15 x
    torch, Toolkit: CPU time / import torch                        1.08 x   <= 1.15 x
    torch, Toolkit: peak memory beyond                             2.52 MiB <= 30 MiB
    torch, Toolkit, imports of quantize: CPU time / import torch   1.20 x   <= 1.15 x
    torch, Toolkit, imports of quantize: peak memory beyond        11.9 MiB <= 30 MiB
    a Linear, quantized and run once: / a Linear, run once         3.04 x
    bittern --help: wall time                                      0.19 s   <= 0.4 s

1.20 is pydantic and PyYAML, which read the recipe. 3.04 is the huggingface plugin of that day: it
imported transformers to look at any model.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import Figure, environment, fresh, parser, report

TOOLKIT = """
import bittern as bt
bt.quantize
from bittern.toolkit import default_toolkit
toolkit = default_toolkit()
for table in ("modules", "formats", "algorithms", "exporters", "recipes", "kernels"):
    getattr(toolkit.registry, table)
"""
# Name to the code of the case.
CASES = {
    "python": "",
    "import torch": "import torch",
    "import bittern": "import bittern",
    "Toolkit": TOOLKIT,
    "torch, Toolkit": "import torch\n" + TOOLKIT,
    "torch, Toolkit, imports of quantize": "import torch\n"
    + TOOLKIT
    + "import bittern.planning, bittern.convert, bittern.calibration, bittern.report",
    "a Linear, run once": "import torch\ntorch.nn.Linear(8, 8)(torch.ones(1, 8))",
    "a Linear, quantized and run once": TOOLKIT
    + """
import torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
bt.quantize(model, "int8", [torch.ones(1, 8)])
model(torch.ones(1, 8))
""",
}
MEASURE = """
import json, resource, sys, time
print(json.dumps({
    "cpu": time.process_time(),
    "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "torch": "torch" in sys.modules,
    "frameworks": [m for m in ("transformers", "datasets", "accelerate", "triton")
                   if m in sys.modules],
}))
"""
HELP = """
import json, sys
from bittern.cli.main import main
sys.argv = ["bittern", "--help"]
try:
    main()
except SystemExit:
    pass
print(json.dumps({"torch": "torch" in sys.modules}))
"""


def help_seconds(repeats: int) -> float:
    """Return the wall time of ``bittern --help``, the best of the repeats."""
    command = [str(Path(sys.executable).parent / "bittern"), "--help"]
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=7)
    args = arguments.parse_args()
    about = environment()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(args.repeats + 1):
        for name, code in CASES.items():
            runs[name].append(fresh("-c", code + MEASURE))
    cpu = {name: min(run["cpu"] for run in found[1:]) for name, found in runs.items()}
    rss = {name: min(run["rss"] for run in found[1:]) for name, found in runs.items()}

    def compared(name: str, base: str, *, goal: bool = True) -> list[Figure]:
        last = runs[name][-1]
        note = f"against {cpu[base]:.3f} s, {rss[base]:.0f} MiB"
        note += "" if last["torch"] else "; torch is not imported"
        note += f"; imports {', '.join(last['frameworks'])}" if last["frameworks"] else ""
        ratio, more = (1.15, 30.0) if goal else (None, None)
        found = [Figure(f"{name}: CPU time / {base}", cpu[name] / cpu[base], "x", ratio, note)]
        if last["torch"]:
            memory = rss[name] - rss[base]
            found.append(Figure(f"{name}: peak memory beyond", memory, "MiB", more))
        return found

    torch_free = not fresh("-c", HELP)["torch"]
    figures = [
        *(Figure(f"{name}: CPU time", cpu[name], "s") for name in CASES),
        *compared("import bittern", "import torch"),
        *compared("Toolkit", "import torch"),
        *compared("torch, Toolkit", "import torch"),
        *compared("torch, Toolkit, imports of quantize", "import torch"),
        *compared("a Linear, quantized and run once", "a Linear, run once", goal=False),
        Figure(
            "bittern --help: wall time",
            help_seconds(args.repeats),
            "s",
            0.4,
            "torch is not imported" if torch_free else "IMPORTS TORCH",
        ),
    ]
    report("Start-up", figures, json_path=args.json, about=about)


if __name__ == "__main__":
    main()
