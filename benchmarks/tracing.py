"""How long it takes to trace a model: with example inputs, and without.

    python benchmarks/tracing.py [--json FILE]

CPU time of one thread, on models without pretrained weights, on the meta device. `bt.trace` stands
beside `torch.export` of the same model in the same run; its parts are measured one by one. The
symbolic path is `recursive_trace` and `analyze_symbols`. The models are written here, so that
nothing but torch is needed; a Llama of transformers is measured where that is installed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from common import Figure, best, cpu_seconds, environment, parser, report
from torch import Tensor, nn
from torch.nn import functional as F

import bittern as bt
from bittern.toolkit import default_toolkit
from bittern.tracing import Trace
from bittern.tracing.coverage import guard_branches
from bittern.tracing.flow import Flow
from bittern.tracing.flow.record import record
from bittern.tracing.groups import settle_cuts
from bittern.tracing.symbolic import analyze_symbols, recursive_trace


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, 4 * width, H / stride, W / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """The shape of ResNet-50: 3, 4, 6, 3 bottlenecks."""

    def __init__(self, depths: Iterable[int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        inputs, stages = 64, []
        for stage, depth in enumerate(depths):
            width = 64 << stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Bottleneck(inputs, width, stride))
                inputs = 4 * width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images ``(N, 3, H, W)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Attention(nn.Module):
    """Causal attention with grouped heads and rotary positions."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size, self.repeats = width // heads, heads // kv_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix tokens ``(B, T, width)``."""
        b, t, _ = x.shape
        q, k, v = (
            projection(x).view(b, t, -1, self.size).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self.rotate(heads, cos, sin) for heads in (q, k))
        k, v = (heads.repeat_interleave(self.repeats, dim=1) for heads in (k, v))
        weights = (q @ k.transpose(2, 3) / math.sqrt(self.size)).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(b, t, -1))

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn heads ``(B, H, T, size)`` by their positions."""
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin


class Block(nn.Module):
    """A decoder block: attention and a gated MLP, each after an RMS norm."""

    def __init__(self, width: int = 64, heads: int = 8, kv_heads: int = 2) -> None:
        super().__init__()
        self.input_layernorm, self.post_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.self_attn = Attention(width, heads, kv_heads)
        self.gate_proj = nn.Linear(width, 3 * width, bias=False)
        self.up_proj = nn.Linear(width, 3 * width, bias=False)
        self.down_proj = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``(B, T, width)`` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        h = self.post_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Decoder(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, blocks: int, width: int = 64) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(1000, width), nn.RMSNorm(width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 1000, bias=False)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return logits ``(B, T, vocabulary)`` of tokens ``(B, T)``."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def chain(blocks: int) -> nn.Module:
    """Return residual blocks one after the other."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(self.norm(x)).relu())

    return nn.Sequential(nn.Linear(4, 8), *[Residual() for _ in range(blocks)], nn.Linear(8, 2))


def rotary() -> dict[str, Tensor]:
    """Return inputs of the decoder."""
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    return {"tokens": tokens, "cos": torch.zeros(8, 8), "sin": torch.zeros(8, 8)}


def llama() -> nn.Module:
    """Return a small Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


Inputs = Callable[[], dict[str, Any]]
PARTS = ("fake run", "flow", "groups", "shared inputs", "folds", "coverage")


def whole(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Trace a model and ask for everything."""
    trace = bt.trace(model, inputs)
    assert trace.coverage.fraction == 1
    _ = trace.groups, trace.shared_inputs, trace.foldable


def parts(model: nn.Module, inputs: dict[str, Any]) -> list[float]:
    """Return the CPU seconds of each of the `PARTS` of one trace."""
    registry = default_toolkit().registry
    found: list[Any] = []

    def flow() -> None:
        found.append(Flow(found[0], registry.ops))
        found[1].run()
        settle_cuts(found[1])
        guard_branches(found[1], model)

    seconds = [
        cpu_seconds(lambda: found.append(record(model, (), inputs, knows=registry.ops.knows))),
        cpu_seconds(flow),
    ]
    trace = Trace(model, found[1], registry.leaves, registry.symbols)
    rest = ("groups", "shared_inputs", "foldable", "coverage")
    return seconds + [cpu_seconds(lambda what=what: getattr(trace, what)) for what in rest]


def with_inputs(name: str, build: Callable[[], nn.Module], inputs: Inputs) -> list[Figure]:
    """Measure `bt.trace` and its parts beside `torch.export`."""
    with torch.device("meta"):
        model, example = build().eval(), inputs()
    whole(model, example)
    torch.export.export(model, (), example)
    ours, theirs, each = [], [], []
    for _ in range(5):  # in turn: what disturbs one disturbs the other
        ours.append(cpu_seconds(lambda: whole(model, example)))
        theirs.append(cpu_seconds(lambda: torch.export.export(model, (), example)))
        each.append(parts(model, example))
    figures = [
        Figure(f"bt.trace, {name}", 1000 * median(ours), "ms", note="everything"),
        Figure(f"torch.export, {name}", 1000 * median(theirs), "ms", note="the same model"),
        Figure(
            f"bt.trace / torch.export, {name}",
            median(a / b for a, b in zip(ours, theirs, strict=True)),
            "x",
            1.3,
        ),
    ]
    return figures + [
        Figure(f"  {part}, {name}", 1000 * median(values), "ms")
        for part, values in zip(PARTS, zip(*each, strict=True), strict=True)
    ]


def growth() -> list[Figure]:
    """Measure whether the time of `bt.trace` is linear in the number of blocks."""
    per_block: dict[int, float] = {}
    for n in (10, 100, 1000):
        with torch.device("meta"):
            model, inputs = chain(n).eval(), {"input": torch.zeros(2, 4)}
        whole(model, inputs)
        repeats = 3 if n == 1000 else 5
        runs = [cpu_seconds(lambda m=model, i=inputs: whole(m, i)) for _ in range(repeats)]
        per_block[n] = 1000 * median(runs) / n
    return [
        Figure(f"bt.trace, per block of {n}", value, "ms", 1.5 * per_block[10] if n > 10 else None)
        for n, value in per_block.items()
    ]


def run_paths() -> Iterable[Figure]:
    """Measure the path with example inputs."""
    yield from with_inputs("ResNet-50", ResNet, lambda: {"x": torch.zeros(1, 3, 64, 64)})
    yield from with_inputs("8 decoder blocks", lambda: Decoder(8), rotary)
    if importlib.util.find_spec("transformers") is not None:
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        inputs = {"input_ids": tokens, "use_cache": False}
        yield from with_inputs("8 Llama layers", llama, lambda: inputs)
    yield from growth()


def milliseconds(build: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> float:
    with torch.device("meta"):
        model = build()
    return 1000 * best(lambda: run(model))


def symbolic() -> list[Figure]:
    """Measure the path without example inputs."""
    figures = [
        Figure(what, milliseconds(build, analyze_symbols), "ms", goal, note)
        for what, build, goal, note in (
            ("trace + symbols, ResNet-50", ResNet, 60, "16 bottlenecks"),
            (
                "trace + symbols, 8 decoder blocks",
                lambda: Decoder(8),
                80,
                "Llama-like, grouped heads",
            ),
        )
    ]
    figures += [
        Figure(what, milliseconds(build, recursive_trace), "ms", note="the graphs alone")
        for what, build in (
            ("trace, ResNet-50", ResNet),
            ("trace, 8 decoder blocks", lambda: Decoder(8)),
        )
    ]
    per_block = {
        n: milliseconds(lambda n=n: chain(n), analyze_symbols) / n for n in (10, 100, 1000)
    }
    figures += [
        Figure(
            f"trace + symbols, per block of {n}",
            value,
            "ms",
            1.5 * per_block[10] if n > 10 else None,
        )
        for n, value in per_block.items()
    ]
    return figures


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    about = environment()
    report("tracing", [*run_paths(), *symbolic()], json_path=arguments.json, about=about)


if __name__ == "__main__":
    main()
