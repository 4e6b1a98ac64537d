"""Folds: a scale can move into the producer, exactly where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bittern.records import Fold
from bittern.toolkit import Toolkit

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """A producer, something between, and consumers."""

    def __init__(self, between: Callable[[Tensor], Any], *, width: int = 8, out: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, width), nn.Linear(out if out != 3 else width, 3)
        self.between = between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def pairs(folds: tuple[Fold, ...]) -> set[tuple[str, tuple[str, ...]]]:
    return {(fold.producer, fold.consumers) for fold in folds}


@torch.no_grad()
def fold_scale(model: nn.Module, fold: Fold) -> None:
    """Do what a fold says it allows, with powers of two."""
    size = fold.scaled[0].index.shape[0]
    generator = torch.Generator().manual_seed(1)
    scale = 2.0 ** torch.randint(-3, 4, (size,), generator=generator).double()
    for members, factor in ((fold.scaled, scale), (fold.divided, 1 / scale)):
        for member in members:
            tensor = getattr(model.get_submodule(member.module), member.tensor)
            rows = torch.ones(tensor.shape[member.dim], dtype=tensor.dtype)
            rows[member.index] = factor[:, None].expand(member.index.shape)
            tensor.mul_(rows.reshape([-1 if d == member.dim else 1 for d in range(tensor.dim())]))


def check(model: nn.Module, folds: tuple[Fold, ...], *inputs: Tensor) -> None:
    """Every fold changes weights and, to nine digits, no output."""
    model.eval()
    for fold in folds:
        before, state = model(*inputs), {k: v.clone() for k, v in model.state_dict().items()}
        fold_scale(model, fold)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
        assert {f"{m.module}.{m.tensor}" for m in fold.scaled + fold.divided} >= changed != set()
        torch.testing.assert_close(model(*inputs), before, rtol=1e-9, atol=1e-9)


LEGAL: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": F.relu,
    "leaky relu": F.leaky_relu,
    "abs": torch.abs,
    "times a number": lambda x: x * 3,
    "divided by a number": lambda x: x / 3,
    "dropout": lambda x: F.dropout(x, training=False),
    "views": lambda x: x.view(2, 4, 2).reshape(2, 8),
    "moved": lambda x: x.t().contiguous().t(),
    "times a constant vector": lambda x: x.relu() * torch.ones(8, dtype=x.dtype),
    "masked": lambda x: x.masked_fill(torch.eye(2, 8).bool(), 0),
}
ILLEGAL: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "softmax": lambda x: x.softmax(-1),
    "plus a number": lambda x: x + 1,
    "square": lambda x: x * x,
    "norm": lambda x: F.layer_norm(x, (8,)),
    "clamp": lambda x: x.clamp(max=1),
    "relu6": F.relu6,
    "masked with a number": lambda x: x.masked_fill(torch.eye(2, 8).bool(), 1),
    "a number divided by it": lambda x: 1 / x,
    "added to another activation": lambda x: x + x.tanh(),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_a_scale_passes(name: str, toolkit: Toolkit) -> None:
    model = Net(LEGAL[name])
    folds = toolkit.trace(model, X).foldable
    assert pairs(folds) == {("a", ("b",))}
    assert {(m.module, m.tensor) for m in folds[0].scaled} == {("a", "weight"), ("a", "bias")}
    assert {(m.module, m.tensor, m.dim) for m in folds[0].divided} == {("b", "weight", 1)}
    assert folds[0].reason
    check(model, folds, X)


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_a_scale_does_not_pass(name: str, toolkit: Toolkit) -> None:
    assert toolkit.trace(Net(ILLEGAL[name]), X).foldable == ()


def test_a_gated_mlp_folds_into_up_only(toolkit: Toolkit) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(6)
            self.gate, self.up = nn.Linear(6, 8), nn.Linear(6, 8)
            self.down = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    model = Gated().double()
    folds = toolkit.trace(model, X).foldable
    assert pairs(folds) == {("norm", ("gate", "up")), ("up", ("down",))}
    check(model, folds, X)


def test_conv_norm_relu_conv(toolkit: Toolkit) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
    )
    model.double().eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    folds = toolkit.trace(model, x).foldable
    assert pairs(folds) == {("1", ("4",))}
    check(model, folds, x)


def test_values_fold_through_attention_with_grouped_heads(toolkit: Toolkit) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 8)
            self.o = nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q = self.q(x).view(b, t, 4, 4).transpose(1, 2)
            k, v = (p(x).view(b, t, 2, 4).transpose(1, 2) for p in (self.k, self.v))
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(mixed.transpose(1, 2).reshape(b, t, 16))

    model = Grouped().double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    folds = toolkit.trace(model, x).foldable
    assert pairs(folds) == {("v", ("o",))}
    (scaled, *_), (divided,) = folds[0].scaled, folds[0].divided
    assert scaled.index.shape == (8, 1)
    assert divided.index.shape == (8, 2)  # each value channel serves two heads
    check(model, folds, x)


def test_a_producer_that_somebody_else_reads_too_is_none(toolkit: Toolkit) -> None:
    class Aside(Net):
        def forward(self, x: Tensor) -> Any:
            hidden = self.a(x)
            return self.b(hidden), hidden.tanh()

    assert toolkit.trace(Aside(F.relu), X).foldable == ()


def test_a_producer_that_the_model_returns_is_none(toolkit: Toolkit) -> None:
    class Returned(Net):
        def forward(self, x: Tensor) -> Any:
            hidden = self.a(x)
            return self.b(hidden), hidden

    assert toolkit.trace(Returned(F.relu), X).foldable == ()


def test_a_consumer_that_reads_something_else_too_is_none(toolkit: Toolkit) -> None:
    class Again(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.b(x.repeat(1, 2)[:, :8])

    assert toolkit.trace(Again(F.relu), X).foldable == ()


def test_a_weight_that_is_also_the_head_is_no_producer(
    make_lm: Callable[..., nn.Module], toolkit: Toolkit
) -> None:
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    free = pairs(toolkit.trace(make_lm(), tokens).foldable)
    tied = pairs(toolkit.trace(make_lm(tied=True), tokens).foldable)
    assert ("norm", ("head",)) in free
    assert ("norm", ("head",)) not in tied


def test_what_ended_early_is_not_folded_beyond(toolkit: Toolkit) -> None:
    class Ends(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x).relu()
            out = self.b(hidden)
            raise RuntimeError(out.shape, hidden.shape)

    assert toolkit.trace(Ends(F.relu), X).foldable == ()
