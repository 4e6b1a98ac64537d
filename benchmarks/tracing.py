"""How long it takes to trace and analyse a model without example inputs.

    python benchmarks/tracing.py [--json FILE]

CPU time of one thread: `recursive_trace` and `analyze_symbols` on models without pretrained
weights, on the meta device. The models are written here, so that nothing but torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from common import Figure, best, environment, parser, report
from torch import Tensor, nn
from torch.nn import functional as F

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
    report("tracing", symbolic(), json_path=arguments.json, about=about)


if __name__ == "__main__":
    main()
