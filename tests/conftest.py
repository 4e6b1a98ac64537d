"""Fixtures of all tests: a Toolkit without plugins, small models, bitwise comparison.

Property tests run the same examples every time; ``HYPOTHESIS_PROFILE=explore`` looks for new ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from bittern.builtin import hooks as builtin
from bittern.hooks import hookimpl
from bittern.hooks.discovery import PluginOptions, PluginRecord
from bittern.hooks.manager import PluginManager
from bittern.records import (
    Granularity,
    ModelAdapter,
    NumberFormat,
    PerTensor,
    QuantizerSpec,
)
from bittern.toolkit import Toolkit

_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("default", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=5000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


# --- numbers --------------------------------------------------------------------------------------


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    mine, theirs = (
        t.detach().contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (a, b)
    )
    return torch.equal(mine, theirs)


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors have the same dtype, shape and bits: -0 differs from +0."""
    return _same_bits


def _number_format(name: str) -> NumberFormat:
    if name.startswith("fp8"):
        dtype = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[name]
        codec, params = "bittern.numerics.floats:FloatCodec", {"dtype": dtype}
        return NumberFormat(name=name, bits=8, kind="float", codec=codec, params=params)
    bits, narrow = int(name[3:].removesuffix("n")), name.endswith("n")
    params = {"bits": bits, "narrow": narrow}
    return NumberFormat(
        name=name, bits=bits, codec="bittern.numerics.integers:IntCodec", params=params
    )


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., QuantizerSpec]:
    """Makes specs: ``make_spec("int4n", PerGroup(8))``; a trailing n is a narrow range."""

    def make(
        name: str, granularity: Granularity | None = None, *, dynamic: bool = False
    ) -> QuantizerSpec:
        return QuantizerSpec(_number_format(name), granularity or PerTensor(), dynamic)

    return make


# --- toolkits -------------------------------------------------------------------------------------


def _plugin(name: str, **hooks: Any) -> ModuleType:
    module = ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    return module


def _toolkit(*modules: ModuleType) -> Toolkit:
    manager = PluginManager(PluginOptions(), builtin=builtin, records=())
    for module in modules:
        name = module.__name__
        record = PluginRecord(name=name, distribution=f"bittern-{name}", version="1.0", entry=name)
        manager._keep(manager._register(record, module))
    return Toolkit(manager=manager)


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    """Core alone, whatever plugins are installed."""
    return _toolkit()


@pytest.fixture(scope="session")
def make_plugin() -> Callable[..., ModuleType]:
    """Makes a plugin in memory: ``make_plugin("alpha", register_formats=lambda: [...])``."""
    return _plugin


@pytest.fixture(scope="session")
def toolkit_with() -> Callable[..., Toolkit]:
    """Makes a Toolkit of core and of plugins in memory."""
    return _toolkit


# --- models ---------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two linears and a norm."""

    def __init__(self, width: int = 8, hidden: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


class Block(nn.Module):
    """An attention block whose q, k and v read one tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(mixed)


class TinyLM(nn.Module):
    """A causal language model."""

    def __init__(self, vocab: int = 32, width: int = 16, depth: int = 2, *, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@pytest.fixture
def make_mlp() -> Callable[..., MLP]:
    """Makes the same small MLP every time: ``up``, ``norm``, ``down``."""

    def make(**sizes: int) -> MLP:
        torch.manual_seed(0)
        return MLP(**sizes).eval()

    return make


@pytest.fixture
def make_lm() -> Callable[..., TinyLM]:
    """Makes the same language model every time."""

    def make(**options: Any) -> TinyLM:
        torch.manual_seed(0)
        return TinyLM(**options).eval()

    return make


@pytest.fixture
def batches() -> list[Tensor]:
    """Three batches for the MLP."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 8, generator=generator) for _ in range(3)]


@pytest.fixture
def token_batches() -> list[Tensor]:
    """Two batches for the language model."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 32, (3, 12), generator=generator) for _ in range(2)]


@pytest.fixture(scope="session")
def lm_adapter() -> ModelAdapter:
    """What a plugin would say about the language model."""
    return ModelAdapter(
        roles={"head": "head", "embed": "embedding"},
        vocab_size=32,
        causal=True,
        logits=lambda output: output,
    )
