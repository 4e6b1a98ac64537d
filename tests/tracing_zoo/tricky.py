"""Models that lead a tracer into temptation: what happens to channels between two linear layers.

Each is a function of the hidden activations, put between a linear layer that writes them and one
that reads them. Some leave the channels free, some couple them to something, some fix their order;
which is which, the physical tests decide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from tracing_zoo.entry import Entry

__all__ = ["TRICKY"]

INP, HIDDEN, OUT = 6, 12, 5


def features(generator: Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 7, INP, generator=generator, dtype=torch.float64)}


class Between(nn.Module):
    """A trick of two tensors between linear layers."""

    def __init__(self, trick: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.inp = nn.Linear(INP, HIDDEN)
        self.other = nn.Linear(INP, HIDDEN)
        self.out = nn.Linear(width, OUT)
        self.trick = trick

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.trick(torch.tanh(self.inp(x)), torch.tanh(self.other(x))))


def written_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x += y
    x.mul_(2).relu_()
    return x


def assigned_to_slices(x: Tensor, y: Tensor) -> Tensor:
    both = x.new_zeros(*x.shape[:-1], 2 * HIDDEN)
    both[..., :HIDDEN] = x
    both[..., HIDDEN:] = y
    return both


def times_positions(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.arange(HIDDEN, dtype=x.dtype) + y


def gathered(x: Tensor, y: Tensor) -> Tensor:
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 11, 10])
    return x[..., order] + y.index_select(-1, order.flip(0))


def hand_normed(x: Tensor, y: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + y


def channel_attention(x: Tensor, y: Tensor) -> Tensor:
    weights = (x.transpose(-1, -2) @ y).softmax(-1)  # channels by channels
    return y @ weights.transpose(-1, -2)


def gram(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) + y.mean(-1, keepdim=True)


def outer(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)


def interleaved(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], -1).flatten(-2)


def scattered(x: Tensor, y: Tensor) -> Tensor:
    index = torch.arange(HIDDEN).flip(0).expand_as(x)
    return torch.zeros_like(x).scatter(-1, index, x) + y


def convolved(x: Tensor, y: Tensor) -> Tensor:
    kernel = torch.tensor([[[0.2, 0.5, 0.3]]], dtype=x.dtype)
    return F.conv1d(x.flatten(0, 1).unsqueeze(1), kernel, padding=1).view_as(x) + y


def rotated(x: Tensor, y: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1) * y + x


# Their code has numbers in it that do not follow, so nothing can be taken away.
RIGID = {"assigned_to_slices", "halves_of_one", "maxout", "grouped_otherwise"}
TRICKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "written_in_place": (written_in_place, HIDDEN),
    "assigned_to_slices": (assigned_to_slices, 2 * HIDDEN),
    "times_positions": (times_positions, HIDDEN),
    "gathered": (gathered, HIDDEN),
    "scattered": (scattered, HIDDEN),
    "flipped": (lambda x, y: x + y.flip(-1), HIDDEN),
    "added_to_its_mirror": (lambda x, y: x + x.flip(-1) * y, HIDDEN),
    "rolled": (lambda x, y: x + x.roll(1, -1) + y, HIDDEN),
    "summed_up": (lambda x, y: x.cumsum(-1) + y, HIDDEN),
    "sorted": (lambda x, y: x.sort(-1).values + y, HIDDEN),
    "largest": (lambda x, y: x.topk(4, -1).values + y[..., :4], 4),
    "first_is_special": (lambda x, y: x * y[..., :1], HIDDEN),
    "every_second": (lambda x, y: x[..., ::2] + y[..., 1::2], HIDDEN // 2),
    "halves": (lambda x, y: F.glu(torch.cat([x, y], -1), -1), HIDDEN),
    "halves_of_one": (lambda x, y: F.glu(x, -1) + y.unflatten(-1, (2, -1)).amax(-2), HIDDEN // 2),
    "maxout": (lambda x, y: x.unflatten(-1, (4, 3)).amax(-1) + y[..., :4] * 0, 4),
    "padded": (lambda x, y: F.pad(x, (2, 3)) + F.pad(y, (3, 2)), HIDDEN + 5),
    "repeated_whole": (lambda x, y: x.repeat(1, 1, 2) + torch.cat([y, y], -1), 2 * HIDDEN),
    "repeated_each": (lambda x, y: x.repeat_interleave(2, -1) + interleaved(y, y), 2 * HIDDEN),
    "interleaved": (interleaved, 2 * HIDDEN),
    "gram": (gram, HIDDEN * HIDDEN),
    "outer": (outer, HIDDEN * HIDDEN),
    "softmax": (lambda x, y: x.softmax(-1) * y, HIDDEN),
    "normalized": (lambda x, y: F.normalize(x, dim=-1) + F.layer_norm(y, y.shape[-1:]), HIDDEN),
    "hand_normed": (hand_normed, HIDDEN),
    "channel_attention": (channel_attention, HIDDEN),
    "convolved": (convolved, HIDDEN),
    "pooled": (lambda x, y: F.avg_pool1d(x, 3) + F.max_pool1d(y, 3), HIDDEN // 3),
    "transformed": (lambda x, y: torch.fft.rfft(x, dim=-1).abs() + y[..., :7], 7),
    "chosen": (lambda x, y: torch.where(x > y, x, y) - torch.maximum(x, -y), HIDDEN),
    "masked": (lambda x, y: x.masked_fill(y > 0, 0.0), HIDDEN),
    "rotated": (rotated, HIDDEN),
    "distances": (torch.cdist, 7),
    "linear_functional": (lambda x, y: F.linear(x, torch.eye(HIDDEN, dtype=x.dtype)) + y, HIDDEN),
    "reshaped_away": (lambda x, y: x.reshape(2, 12, 7).transpose(1, 2) + y, HIDDEN),
    "grouped_otherwise": (
        lambda x, y: (x.unflatten(-1, (3, 4)) * y.unflatten(-1, (4, 3)).mT).flatten(-2),
        HIDDEN,
    ),
}


class Autoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(INP, 10)
        self.encode = nn.Linear(10, HIDDEN)
        self.bias = nn.Parameter(torch.zeros(10))
        self.out = nn.Linear(10, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.encode(torch.tanh(self.inp(x))))
        return self.out(torch.tanh(F.linear(x, self.encode.weight.t(), self.bias)))


class LowRank(nn.Module):
    """A weight with a low-rank update, one with a mask, one that is standardised."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(INP, HIDDEN)
        self.a, self.b = nn.Parameter(torch.zeros(3, HIDDEN)), nn.Parameter(torch.zeros(10, 3))
        self.base = nn.Linear(HIDDEN, 10)
        self.masked = nn.Linear(10, 8)
        self.register_buffer("mask", (torch.arange(80).view(8, 10) % 3 > 0).double())
        self.standard = nn.Linear(8, 7)
        self.out = nn.Linear(7, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        x = torch.tanh(F.linear(x, self.base.weight + self.b @ self.a, self.base.bias))
        x = torch.tanh(F.linear(x, self.masked.weight * self.mask, self.masked.bias))
        weight = self.standard.weight
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return self.out(torch.tanh(F.linear(x, weight)))


class Bomb(nn.Module):
    """Lets float64 pass and raises on anything else, so only who traces in float32 meets it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            raise ValueError("this model cannot run")
        return x


class HalfWay(nn.Module):
    """A model whose run ends while values wait to be read again."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(INP, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 10), nn.Linear(10, HIDDEN)
        self.gate = nn.Linear(HIDDEN, 10)
        self.bomb = Bomb()
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, OUT)
        self.late = nn.Linear(10, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        hidden = torch.tanh(self.up(x)) * self.gate(x)
        y = self.bomb(torch.tanh(self.down(hidden)))
        return self.out(x + self.mix(y)) + self.late(torch.sin(hidden))


class Experts(nn.Module):
    """A mixture of experts as remote code has it: a loop over those that some token asked for."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.inp = nn.Linear(INP, HIDDEN)
        self.router = nn.Linear(HIDDEN, experts)
        self.ups = nn.ModuleList(nn.Linear(HIDDEN, 10) for _ in range(experts))
        self.downs = nn.ModuleList(nn.Linear(10, HIDDEN) for _ in range(experts))
        self.out = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x)).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            made = self.downs[expert](torch.relu(self.ups[expert](x[token])))
            y.index_add_(0, token, made * weights[token, place, None])
        return self.out(x + y)


class Layouts(nn.Module):
    """Convolutions of one and three dimensions, transposed and grouped; bilinear; a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(INP, HIDDEN, 3, padding=1)
        self.back = nn.ConvTranspose1d(HIDDEN, 9, 3, padding=1, groups=3)
        self.three = nn.Conv3d(9, 8, 1)
        self.bag = nn.EmbeddingBag(11, 10, mode="sum")
        self.bilinear = nn.Bilinear(8, 10, 7)
        self.out = nn.Linear(7, OUT)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x.transpose(1, 2)))
        y = torch.relu(self.back(y))[:, :, None, None]
        y = torch.relu(self.three(y)).mean((-1, -2, -3))
        bag = self.bag((x[..., 0] > 0).long() + 3)
        return self.out(torch.relu(self.bilinear(y, torch.relu(bag))))


TRICKY = (
    *(
        Entry(name, lambda t=t, w=w: Between(t, w), features, rigid=name in RIGID)
        for name, (t, w) in TRICKS.items()
    ),
    Entry("autoencoder", Autoencoder, features),
    Entry("low_rank", LowRank, features),
    Entry("half_way", HalfWay, features),
    Entry("experts", lambda: Experts(3), features),
    Entry("experts_that_idle", lambda: Experts(40), features),
    Entry("layouts", Layouts, features),
)
