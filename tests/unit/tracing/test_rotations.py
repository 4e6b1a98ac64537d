"""What is said to commute with a rotation is rotated by a random matrix, and must compute the same;
what works on single channels must be refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bittern.toolkit import Toolkit
from bittern.tracing.rotations import Rotatable, find_rotations

SIZE = 8
Middle = Callable[["Between", Tensor], Tensor]


class Between(nn.Module):
    """Something between two linear layers, with a matrix and two vectors of its own."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, SIZE), nn.Linear(SIZE, 3, bias=False)
        self.vector = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.other = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.table = nn.Parameter(torch.randn(6, SIZE))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.middle(self, self.inp(x)))
        return out


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def by_hand(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


LEGAL: dict[str, Middle] = {
    "nothing": lambda m, x: x,
    "scaled": lambda m, x: -x * 3 / 2,
    "a sum with itself": lambda m, x: x + x * 2,
    "a bias": lambda m, x: x + m.vector,
    "rows of a table": lambda m, x: x + m.table[:4],
    "looked up": lambda m, x: x + F.embedding(torch.tensor([0, 3, 3, 1]), m.table),
    "rms_norm": lambda m, x: F.rms_norm(x, (SIZE,), m.vector),
    "rms_norm without a gain": lambda m, x: x + F.rms_norm(x, (SIZE,)),
    "rms by hand": lambda m, x: rms(x) * m.vector,
    "one plus a gain": lambda m, x: rms(x) * (1 + m.vector),
    "two gains and a bias": lambda m, x: (rms(x) * m.vector + m.table[0]) * m.other,
    "layer_norm": lambda m, x: F.layer_norm(x, (SIZE,), m.vector, m.other),
    "layer_norm by hand": lambda m, x: by_hand(x) * m.vector + m.other,
    "a number is added": lambda m, x: x + 0.5,
    "the norm of all": lambda m, x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "a gate per token": lambda m, x: x * torch.linspace(0, 1, 4)[:, None],
    "a mean over tokens": lambda m, x: x + x.mean(0, keepdim=True),
    "concatenated": lambda m, x: torch.cat([x, m.table[:2]]),
    "written by index": lambda m, x: torch.zeros_like(x).index_add(
        0, torch.tensor([1, 0, 2, 2]), x
    ),
    "attended to": lambda m, x: F.scaled_dot_product_attention(
        torch.ones(1, 2, 3), torch.ones(1, 4, 3), x[None]
    )[0],
}
ILLEGAL: dict[str, Middle] = {
    "relu": lambda m, x: x.relu(),
    "abs": lambda m, x: x.abs(),
    "a square": lambda m, x: x * x,
    "a cube": lambda m, x: x.pow(3),
    "the norm of squares": lambda m, x: x / torch.linalg.vector_norm(x * x, dim=-1, keepdim=True),
    "the variance of squares": lambda m, x: x / x.pow(2).var(-1, keepdim=True),
    "another norm": lambda m, x: x / torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True),
    "the largest": lambda m, x: x / x.amax(-1, keepdim=True),
    "a gain that is added": lambda m, x: rms(x) * m.vector + rms(x),
    "a gain before a norm": lambda m, x: rms(x * m.vector),
    "a gain that is a bias": lambda m, x: rms(x + m.vector) * m.vector,
    "a gain that is two": lambda m, x: rms(rms(x)) * m.vector * (1 + m.vector),
    "a gate": lambda m, x: x * torch.sigmoid(x),
    "a softmax": lambda m, x: x.softmax(-1),
    "rounded": lambda m, x: x.to(torch.int64).to(x.dtype),
    "flipped": lambda m, x: x.flip(-1),
    "a constant": lambda m, x: x + torch.arange(SIZE, dtype=x.dtype),
    "queries": lambda m, x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
}


def found(model: Between, x: Tensor, toolkit: Toolkit) -> list[Rotatable]:
    every = find_rotations(toolkit.trace(model, (x,)).flow)
    return [one for one in every if one.size == SIZE and one.name in ("inp.weight", "table")]


def orthogonal(*, ones: bool) -> Tensor:
    """Return a random orthogonal matrix, one that leaves the vector of ones alone if asked for."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    if not ones:
        return matrix
    first = torch.cat([torch.ones(SIZE, 1), torch.randn(SIZE, SIZE - 1, generator=generator)], 1)
    basis = torch.linalg.qr(first.double())[0]
    inner = torch.eye(SIZE, dtype=torch.float64)
    inner[1:, 1:] = torch.linalg.qr(matrix[1:, 1:])[0]
    return basis @ inner @ basis.T


@pytest.mark.parametrize("name", LEGAL)
def test_what_commutes_computes_the_same(name: str, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = Between(LEGAL[name]).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    if name == "attended to":
        torch.set_default_dtype(torch.float64)
    try:
        (rotatable,) = found(model, x, toolkit)
        assert rotatable.reason == ""
        values = {n: p.detach().clone() for n, p in model.named_parameters()}
        matrix = orthogonal(ones=rotatable.ones)
        for turn in rotatable.turns:
            key = f"{turn.member.module}.{turn.member.tensor}".lstrip(".")
            assert torch.equal(turn.member.index.flatten(), torch.arange(SIZE))
            scale = torch.ones(SIZE, dtype=torch.float64)
            for gain in turn.gains[0]:
                scale = scale * (model.get_parameter(gain.name).detach() + gain.offset)
            moved = values[key].movedim(turn.member.dim, -1)
            moved = (moved / scale if turn.added else moved * scale) @ matrix
            values[key] = moved.movedim(-1, turn.member.dim)
        for gain in rotatable.gains:
            values[gain.name] = torch.full((SIZE,), 1 - gain.offset, dtype=torch.float64)
        after = functional_call(model, values, (x,))
        torch.testing.assert_close(after, model(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not torch.equal(values["inp.weight"], model.inp.weight)


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_works_on_single_channels_is_refused(name: str, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    refused = found(Between(ILLEGAL[name]), x, toolkit)
    assert refused
    assert all(one.reason for one in refused)
