"""Core's rules for attention and for subclasses of layers pass the kit of module rules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bittern.hooks import hookimpl
from bittern.nn import MatMul, ScaledDotProductAttention
from bittern.records import ATTENTION_SLOTS, ModuleRule
from bittern.testing import ModuleCase, ModuleConformance


class ByHand(nn.Module):
    """Attention in three steps, masked, with dropout, of a third party."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        p = F.softmax(scores.masked_fill(mask, -math.inf), dim=-1)
        return F.dropout(p, 0.1, self.training) @ v


class Falcon(nn.Linear):
    """Writes the product out."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Padded(nn.Conv2d):
    """Pads by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


@hookimpl
def register_modules() -> list[ModuleRule]:
    """The rule that users of a third party's attention would write."""
    return [
        ModuleRule(
            target=f"{__name__}:ByHand",
            quantized="bittern.nn.attention:QuantAttention",
            slots=ATTENTION_SLOTS,
        )
    ]


def self_attention(generator: Generator, shape: tuple[int, ...] = (2, 5, 8)) -> tuple[Any, ...]:
    x = torch.randn(shape, generator=generator)
    return x, x, x


def three(*shapes: tuple[int, ...]) -> Any:
    return lambda generator: tuple(torch.randn(shape, generator=generator) for shape in shapes)


class TestCore(ModuleConformance):
    hooks = "bittern.builtin.hooks"

    def cases(self) -> list[ModuleCase]:
        heads = (2, 2, 6, 4)
        return [
            ModuleCase(
                "self-attention",
                make=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
                inputs=self_attention,
            ),
            ModuleCase(
                "cross-attention",
                make=lambda: nn.MultiheadAttention(
                    8, 2, kdim=6, vdim=4, bias=False, add_bias_kv=True, add_zero_attn=True
                ),
                inputs=three((3, 2, 8), (7, 2, 6), (7, 2, 4)),
            ),
            ModuleCase("sdpa", make=ScaledDotProductAttention, inputs=three(heads, heads, heads)),
            ModuleCase("matmul", make=MatMul, inputs=three((2, 3, 4), (2, 4, 5))),
            ModuleCase("falcon", make=lambda: Falcon(16, 8), inputs=three((4, 16)), experts=True),
            ModuleCase("padded-conv", make=lambda: Padded(3, 4, 3), inputs=three((2, 3, 6, 6))),
        ]


class TestThirdParty(ModuleConformance):
    hooks = __name__

    def cases(self) -> list[ModuleCase]:
        heads = (2, 2, 6, 4)
        return [ModuleCase("by-hand", make=ByHand, inputs=three(heads, heads, heads))]
