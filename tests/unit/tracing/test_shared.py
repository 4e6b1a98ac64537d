"""Shared inputs: who multiplies the very same tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bittern.toolkit import Toolkit

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two linears; ``ways`` gives each its input."""

    def __init__(self, ways: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.ways = ways

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.ways(x)
        return self.a(left).sum() + self.b(right).sum()


SAME = {
    "itself": lambda x: (x, x),
    "a reshaped view": lambda x: (x, x.reshape(6, 4)),
    "two views": lambda x: (x.view(6, 4), x.flatten(0, 1)),
    "a no-op cast": lambda x: (x, x.to(x.dtype)),
    "a copy": lambda x: (x, x.clone()),
    "dropout that is off": lambda x: (x, F.dropout(x, training=False)),
    "the same slice twice": lambda x: (x[:, 0], x[:, 0]),
    "the same transposition": lambda x: (x.transpose(0, 1), x.transpose(0, 1)),
    "one activation": lambda x: (h := x.relu(), h),
}
DIFFERENT = {
    "two activations": lambda x: (x.relu(), x.relu()),
    "two slices": lambda x: (x[:, 0], x[:, 1]),
    "a part": lambda x: (x, x[:, :1]),
    "another dtype": lambda x: (x, x.double().float() + 0),
    "a sum": lambda x: (x, x + 1),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_tensor(name: str, toolkit: Toolkit) -> None:
    assert toolkit.trace(Two(SAME[name]), X).shared_inputs == (("a", "b"),)


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_tensor(name: str, toolkit: Toolkit) -> None:
    assert toolkit.trace(Two(DIFFERENT[name]), X).shared_inputs == ()


def test_order_is_that_of_execution(make_lm: Callable[..., nn.Module], toolkit: Toolkit) -> None:
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    groups = toolkit.trace(make_lm(), tokens).shared_inputs
    assert groups == tuple(tuple(f"layers.{i}.{p}" for p in "qkv") for i in (0, 1))


def test_a_module_called_twice_on_one_tensor_shares_with_nobody(toolkit: Toolkit) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.a(x)

    assert toolkit.trace(Twice(), X).shared_inputs == ()


def test_modules_with_one_weight_are_named_each(toolkit: Toolkit) -> None:
    model = Two(lambda x: (x, x))
    model.b.weight = model.a.weight
    assert toolkit.trace(model, X).shared_inputs == (("a", "b"),)


def test_tensors_of_a_module_with_several_have_their_own_names(toolkit: Toolkit) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.ones(4, 8))
            self.gate = nn.Parameter(torch.ones(4, 8))
            self.weight = nn.Parameter(torch.ones(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.up * (x @ self.gate)) @ self.weight

    model = nn.Sequential(Experts())
    assert toolkit.trace(model, X).shared_inputs == (("0.up", "0.gate"),)


def test_convolutions_share_too(toolkit: Toolkit) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 5, 1), nn.Conv1d(3, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    assert toolkit.trace(Branches(), X).shared_inputs == (("a", "b"),)


def test_packed_projections_that_read_one_memory_share_it(toolkit: Toolkit) -> None:
    """torch's decoder layers cut keys and values out of one packed weight each."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
            self.decoder = nn.TransformerDecoder(layer, 2)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.decoder(x, memory)

    trace = toolkit.trace(Decoder().eval(), (torch.randn(1, 3, 8), torch.randn(1, 4, 8)))
    names = tuple(f"decoder.layers.{i}.multihead_attn.in_proj_weight" for i in range(2))
    assert names in trace.shared_inputs
