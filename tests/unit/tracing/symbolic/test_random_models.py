"""Random models: whatever is called searchable must be so physically.

The hand-made models have the shapes that somebody thought of; these have the others.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bittern.tracing.symbolic import analyze_symbols

from .helpers import check_widths

SIDE = 4


class Random(nn.Module):
    """Values of the shape ``(N, C, 4, 4)`` and layers and operations between them."""

    def __init__(self, seed: int, steps: int = 9):
        super().__init__()
        self.random = random.Random(seed)
        self.steps = []
        widths = [3]
        for step in range(steps):
            kinds = ["conv", "conv", "conv", "norm", "act", "add", "cat", "depthwise", "gate"]
            kind = self.random.choice([*kinds, *self.odd])
            a = self.random.randrange(len(widths))
            same = [i for i, w in enumerate(widths) if w == widths[a]]
            b = self.random.choice(same if kind != "cat" else range(len(widths)))
            width = self._make(step, kind, widths[a], widths[b])
            self.steps.append((kind, a, b))
            widths.append(width)
        self.last = nn.Conv2d(widths[-1], 2, 1)
        self.flat = nn.Linear(widths[-1] * SIDE * SIDE, 3)
        self.tail = self.random.choice(["conv", "flat", "rows", "mean"])
        self.head = nn.Linear(widths[-1], 3)

    odd = (
        "scale",
        "position",
        "shuffle",
        "part",
        "swap",
        "split",
        "roundtrip",
        "channels",
        "spatial",
        "half",
        "where",
    )

    def _make(self, step, kind, width, other):
        layers = {
            "norm": lambda: nn.BatchNorm2d(width),
            "depthwise": lambda: nn.Conv2d(width, width, 3, padding=1, groups=width),
            "gate": lambda: nn.Conv2d(width, width, 1),
            "channels": lambda: nn.Linear(width, width),
        }
        if kind == "conv":
            new = self.random.choice([2, 4, 4, 6])
            self.add_module(f"m{step}", nn.Conv2d(width, new, 3, padding=1))
            return new
        if kind in ("scale", "position"):
            shape = (width, 1, 1) if kind == "scale" else (1, width, SIDE, SIDE)
            self.register_parameter(f"m{step}", nn.Parameter(torch.ones(shape)))
            return width
        if kind in layers:
            self.add_module(f"m{step}", layers[kind]())
        return width + other if kind == "cat" else 2 * width if kind == "half" else width

    def forward(self, x):
        values = [x]
        for step, (kind, a, b) in enumerate(self.steps):
            layer = getattr(self, f"m{step}", None)
            values.append(self._step(kind, layer, values[a], values[b]))
        x = values[-1]
        if self.tail == "conv":
            return self.last(x)
        if self.tail == "flat":
            return self.flat(x.flatten(1))
        if self.tail == "rows":
            return self.flat(x.view(x.size(0), -1))
        return self.head(x.mean((2, 3)))

    def _step(self, kind, layer, a, b):
        n = a.shape[0]
        match kind:
            case "conv" | "norm" | "depthwise":
                return layer(a)
            case "scale":
                return a * layer
            case "position":
                return a + layer
            case "act":
                return F.gelu(a)
            case "add":
                return a + b
            case "cat":
                return torch.cat([a, b], 1)
            case "gate":
                return b * layer(F.adaptive_avg_pool2d(a, 1)).sigmoid()
            case "channels":
                return layer(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            case "swap":
                return a.transpose(2, 3) * b
            case "spatial":
                return F.pad(a[:, :, 1:], (0, 0, 1, 0))
            case "split":
                return torch.cat(a.chunk(2, dim=2)[::-1], dim=2)
            case "roundtrip":
                return a.flatten(2).view(n, a.size(1), SIDE, SIDE)
            case "shuffle":
                return a.view(n, 2, -1, SIDE, SIDE).transpose(1, 2).reshape(n, -1, SIDE, SIDE)
            case "part":
                return torch.cat([a[:, 1:], a[:, :1]], 1)
            case "half":
                return torch.cat([a.relu(), -a], 1)
            case "where":
                return torch.where(a > 0, a, b)
        raise AssertionError(kind)


def _widths_fit(model):
    try:
        model(torch.randn(2, 3, SIDE, SIDE))
    except RuntimeError:
        return False  # an odd number of channels was shuffled
    return True


@pytest.mark.filterwarnings("ignore:never called")
@pytest.mark.parametrize("seed", range(60))
def test_every_searchable_width_of_a_random_model_is_one(seed):
    torch.manual_seed(seed)
    model = Random(seed)
    if not _widths_fit(model):
        model = Random(1000 + seed)
    if _widths_fit(model):
        image = torch.randn(2, 3, SIDE, SIDE)
        check_widths(model, analyze_symbols(model), image, all_used=False)
