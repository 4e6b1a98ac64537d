"""Quantize a convolutional net, then train it while it is quantized.

A small residual net learns handwritten digits (8 x 8 pixels, from scikit-learn: no download). Each
recipe below gets a copy of it: BatchNorms are folded into the convolutions, ranges are calibrated
(post-training quantization, PTQ), and the copy is trained on, rounding and all (quantization-aware
training, QAT)::

    pip install scikit-learn
    python examples/cnn_qat.py
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bittern as bt
from bittern.nn import named_quantizers

Data = tuple[Tensor, Tensor]


def low_bits(weight: str, inputs: str) -> dict[str, object]:
    """A recipe with fewer bits; the first and the last layer keep int8, as is usual."""
    edges = {"match": {"name": ["stem", "head"]}, "weight": "int8", "input": "int8"}
    inner = {
        "match": {"class": ["Conv2d", "Linear"]},
        "weight": {"format": weight, "granularity": "channel"},
        "input": {"format": inputs, "granularity": "tensor"},
    }
    return {"rules": [inner, edges], "algorithm": ["fold-batchnorm", "max"]}


RECIPES = {
    "W8A8": "int8-cnn",
    "W3A3": low_bits("int3", "int3"),
    "W2A4": low_bits("int2", "int4"),
}


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around = nn.Sequential()
        if stride > 1:
            around = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.around = nn.Sequential(around, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, width_in, h, w)`` to ``(batch, width, h / stride, w / stride)``."""
        inside = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inside + self.around(x))


class Net(nn.Module):
    """A residual net for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, 1, 8, 8)`` to ``(batch, 10)``."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


def digits() -> tuple[Data, Data]:
    """Two thirds of the digits to learn from, and a third to be tested on."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learn, test = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    return (images[learn], labels[learn]), (images[test], labels[test])


def train(model: nn.Module, data: Data, *, epochs: int, rate: float) -> None:
    """Train, quantized or not; the gradient passes straight through the rounding."""
    images, labels = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * -(-len(labels) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of images that are recognized, in percent."""
    images, labels = data
    return 100 * (model(images).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    """Print the accuracy of every recipe, before and after training."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, help="of training while quantized")
    epochs = parser.parse_args().epochs

    torch.set_num_threads(1)  # so small a net gains nothing from more
    learn, test = digits()
    torch.manual_seed(0)
    trained = Net()
    train(trained, learn, epochs=10, rate=3e-3)
    print(f"{'':4} {'float':>6} {'PTQ':>6} {'QAT':>6}   % of {len(test[1])} digits")

    for name, recipe in RECIPES.items():
        model = copy.deepcopy(trained)
        bt.quantize(model, recipe, data=learn[0][:256].split(64))
        quantized = accuracy(model, test)
        for _, quantizer in named_quantizers(model):
            quantizer.learn()  # ranges are trained along with the weights
        train(model, learn, epochs=epochs, rate=1e-3)
        row = (accuracy(trained, test), quantized, accuracy(model, test))
        print(f"{name:4} " + " ".join(f"{value:6.1f}" for value in row))


if __name__ == "__main__":
    main()
