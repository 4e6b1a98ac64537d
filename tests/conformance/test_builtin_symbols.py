"""Core's own symbol rules pass the kit that every plugin passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bittern.testing import SymbolCase, SymbolConformance


def normal(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda g: tuple(torch.randn(shape, generator=g) for shape in shapes)


def case(name: str, make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> SymbolCase:
    return SymbolCase(name, make=make, inputs=normal(*shapes))


def convolutions(n: int) -> list[SymbolCase]:
    space = (5,) * n
    conv, transposed = getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")
    return [
        case(f"conv{n}d", lambda: conv(4, 6, 3), (2, 4, *space)),
        case(f"conv{n}d-depthwise", lambda: conv(4, 4, 3, groups=4), (2, 4, *space)),
        case(f"conv{n}d-groups", lambda: conv(4, 6, 3, groups=2), (2, 4, *space)),
        case(f"conv-transpose{n}d", lambda: transposed(4, 6, 3), (2, 4, *space)),
    ]


def norms(n: int) -> list[SymbolCase]:
    batch, instance = getattr(nn, f"BatchNorm{n}d"), getattr(nn, f"InstanceNorm{n}d")
    shape = (2, 4, *(5,) * n)
    return [
        case(f"batch-norm{n}d", lambda: scattered(batch(4)), shape),
        case(f"instance-norm{n}d", lambda: scattered(instance(4, affine=True)), shape),
    ]


def scattered(module: nn.Module) -> nn.Module:
    """Give the tensors of a norm, which start out as ones and zeros, numbers of their own."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return module


def recurrent(name: str) -> list[SymbolCase]:
    cls = getattr(nn, name)
    small = {"input_size": 4, "hidden_size": 3, "batch_first": True}
    both = {**small, "num_layers": 2, "bidirectional": True}
    return [
        case(f"{name}", lambda: cls(**small), (2, 5, 4)),
        case(f"{name}-without-bias", lambda: cls(**small, bias=False), (2, 5, 4)),
        case(f"{name}-deep", lambda: cls(**both), (2, 5, 4)),
    ]


def tokens(generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randint(0, 7, (2, 5), generator=generator),)


class TestSymbols(SymbolConformance):
    hooks = "bittern.builtin.hooks"

    def cases(self) -> list[SymbolCase]:
        attention = {"embed_dim": 8, "num_heads": 2, "batch_first": True}
        return [
            case("linear", lambda: nn.Linear(6, 4), (2, 3, 6)),
            case("linear-without-bias", lambda: nn.Linear(6, 4, bias=False), (3, 6)),
            case("bilinear", lambda: nn.Bilinear(4, 5, 6), (3, 4), (3, 5)),
            *(c for n in (1, 2, 3) for c in convolutions(n)),
            *(c for n in (1, 2, 3) for c in norms(n)),
            SymbolCase("sync-batch-norm", make=lambda: nn.SyncBatchNorm(4)),
            case("group-norm", lambda: scattered(nn.GroupNorm(2, 4)), (3, 4, 5)),
            case("group-norm-of-one", lambda: scattered(nn.GroupNorm(1, 4)), (3, 4, 5)),
            case("layer-norm", lambda: scattered(nn.LayerNorm(5)), (3, 4, 5)),
            case("layer-norm-of-two", lambda: scattered(nn.LayerNorm((4, 5))), (3, 4, 5)),
            case("rms-norm", lambda: scattered(nn.RMSNorm(5)), (3, 4, 5)),
            SymbolCase("embedding", make=lambda: nn.Embedding(7, 4), inputs=tokens),
            SymbolCase("embedding-bag", make=lambda: nn.EmbeddingBag(7, 4), inputs=tokens),
            case("prelu", lambda: scattered(nn.PReLU(4)), (3, 4, 5)),
            case("prelu-of-one", nn.PReLU, (3, 4, 5)),
            *(c for name in ("RNN", "GRU", "LSTM") for c in recurrent(name)),
            case("LSTM-projected", lambda: nn.LSTM(4, 6, proj_size=3, num_layers=2), (5, 2, 4)),
            case("attention", lambda: nn.MultiheadAttention(**attention), *[(2, 5, 8)] * 3),
            case(
                "attention-of-three-widths",
                lambda: nn.MultiheadAttention(**attention, kdim=6, vdim=5, add_bias_kv=True),
                *((2, 5, n) for n in (8, 6, 5)),
            ),
            case("sequential", lambda: nn.Sequential(nn.ReLU(), nn.ReLU()), (3, 4)),
        ]
