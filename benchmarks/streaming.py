"""What a model costs whose weights stay on the disk: memory, and time against one in memory.

    python benchmarks/streaming.py [--gigabytes 6] [--recipe int8] [--tokens 256] [--json FILE]

A random Llama in bfloat16 (hidden 2048, MLP 8192) is written shard by shard, loaded with
``device="disk"`` in a process of its own, and quantized with a work directory; the peak of that
process' resident memory counts what the system maps of the files, too. The same recipe on a short
model of the same width, once in memory and once on the disk, gives the times per block.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, environment, fresh, parser, report

WIDTH, INNER, VOCABULARY = 2048, 8192, 8192
SHORT = 6  # blocks of the model that is timed both ways

RUN = """
import json, resource, sys, time
import torch
import bittern as bt
from bittern.records import LoadConfig

source, device, recipe, work, tokens = sys.argv[1:]
torch.manual_seed(0)
model = bt.load(source, config=LoadConfig(dtype="bfloat16", device=device))
data = [{"input_ids": torch.randint(0, model.config.vocab_size, (1, int(tokens)))}]
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
options = {"work_dir": work} if work else {"layerwise": True}
bt.quantize(model, recipe, data, **options)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak": peak * 1024, "loaded": loaded * 1024}))
"""


def write_model(path: Path, blocks: int) -> int:
    """Write a random Llama, one block per file, and return its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    files: dict[str, list[str]] = {}
    for name in shapes:
        number = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{number}.safetensors", []).append(name)
    torch.manual_seed(0)
    total = 0
    for file, names in files.items():
        tensors = {
            name: (0.02 * torch.randn(shapes[name].shape)).to(torch.bfloat16)
            if shapes[name].dim() > 1
            else torch.ones(shapes[name].shape, dtype=torch.bfloat16)
            for name in names
        }
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def run(source: Path, device: str, recipe: str, work: Path | None, tokens: int) -> dict[str, Any]:
    """Quantize in a fresh process."""
    return fresh("-c", RUN, str(source), device, recipe, str(work or ""), str(tokens))


def main() -> None:
    """Print memory and times."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--gigabytes", type=float, default=6.0)
    options_parser.add_argument("--recipe", default="int8")
    options_parser.add_argument("--tokens", type=int, default=256)
    options = options_parser.parse_args()
    about = environment()
    per_block = 2 * (WIDTH * WIDTH * 5 // 2 + 3 * WIDTH * INNER)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        short, long = Path(folder) / "short", Path(folder) / "long"
        write_model(short, SHORT)
        memory = run(short, "cpu", options.recipe, None, options.tokens)
        disk = run(short, "disk", options.recipe, Path(folder) / "work-short", options.tokens)
        figures += [
            Figure(f"{SHORT} blocks in memory", memory["seconds"], "s"),
            Figure(f"{SHORT} blocks on the disk", disk["seconds"], "s"),
            Figure("disk / memory", disk["seconds"] / memory["seconds"], "x", goal=1.5),
        ]
        count = round(options.gigabytes * 1e9 / per_block)
        size = write_model(long, count)
        found = run(long, "disk", options.recipe, Path(folder) / "work-long", options.tokens)
        figures += [
            Figure(f"{count} blocks, the model", size / 1e9, "GB"),
            Figure("seconds per block", found["seconds"] / count, "s"),
            Figure("peak resident memory", found["peak"] / 1e9, "GB", goal=2.5),
            Figure("of which before quantizing", found["loaded"] / 1e9, "GB"),
        ]
    report("Streaming", figures, json_path=options.json, about=about)


if __name__ == "__main__":
    main()
