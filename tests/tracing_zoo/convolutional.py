"""Convolutional networks of the zoo, hand-made: one for every way channels can be coupled."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracing_zoo.entry import Entry, image

__all__ = ["CONVOLUTIONAL"]


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, unless told otherwise, ReLU6."""

    def __init__(
        self, inp: int, out: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, act=nn.ReLU6
    ) -> None:
        pad = kernel // 2
        layers: list[nn.Module] = [
            nn.Conv2d(inp, out, kernel, stride, pad, groups=groups, bias=False),
            nn.BatchNorm2d(out),
        ]
        super().__init__(*layers, *([act()] if act else []))


class Head(nn.Sequential):
    """Global average pooling and a classifier."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class BasicBlock(nn.Module):
    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down: nn.Module | None = None
        if stride != 1 or inp != out:
            self.down = nn.Sequential(nn.Conv2d(inp, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    """Residual blocks, one with and one without a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, act=nn.ReLU)
        self.block1 = BasicBlock(8, 8, 1)
        self.block2 = BasicBlock(8, 12, 2)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(self.stem(x))))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project."""

    def __init__(self, channels: int, hidden: int, squeeze: int = 0) -> None:
        super().__init__()
        self.expand = ConvNorm(channels, hidden, 1)
        self.depthwise = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.squeeze = SqueezeExcite(hidden, squeeze) if squeeze else nn.Identity()
        self.project = ConvNorm(hidden, channels, 1, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.squeeze(self.depthwise(self.expand(x))))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(scale))))


def mobilenet() -> nn.Module:
    """MobileNetV2: the depthwise convolution belongs to the expansion."""
    return nn.Sequential(
        ConvNorm(3, 8, stride=2), InvertedResidual(8, 20), InvertedResidual(8, 14), Head(8)
    )


def efficientnet() -> nn.Module:
    """EfficientNet: a squeeze-excite gate multiplies the expansion."""
    return nn.Sequential(
        ConvNorm(3, 8, stride=2, act=nn.SiLU), InvertedResidual(8, 20, squeeze=6), Head(8)
    )


class ConvNextBlock(nn.Module):
    """Depthwise convolution, then channels last: norm, MLP, layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 22)
        self.down = nn.Linear(22, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.block1 = ConvNextBlock(8)
        self.down = nn.Conv2d(8, 12, 2, 2)
        self.block2 = ConvNextBlock(12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.down(self.block1(self.stem(x))))
        return self.head(self.norm(x.mean((-2, -1))))


class DenseLayer(nn.Module):
    """Pre-activation layer whose output is appended to its input."""

    def __init__(self, inp: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inp)
        self.conv = nn.Conv2d(inp, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    """DenseNet: nested concatenations with offsets, and a transition."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        DenseLayer(8, 6),
        DenseLayer(14, 4),
        ConvNorm(18, 10, 1, act=nn.ReLU),
        nn.AvgPool2d(2),
        DenseLayer(10, 6),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Head(16),
    )


class UNet(nn.Module):
    """Skip connections by concatenation; one stage goes up by interpolation, one is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = ConvNorm(3, 6)
        self.enc2 = ConvNorm(6, 10)
        self.mid = ConvNorm(10, 14)
        self.up2 = nn.ConvTranspose2d(14, 8, 2, 2)
        self.dec2 = ConvNorm(18, 12)
        self.dec1 = ConvNorm(18, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.enc1(x)
        two = self.enc2(F.max_pool2d(one, 2))
        mid = self.mid(F.max_pool2d(two, 2))
        y = self.dec2(torch.cat([self.up2(mid), two], 1))
        y = F.interpolate(y, scale_factor=2, mode="bilinear")
        return self.out(self.dec1(torch.cat([y, one], 1)))


class Inception(nn.Module):
    """Four branches, concatenated, read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8)
        self.one = ConvNorm(8, 4, 1)
        self.three = nn.Sequential(ConvNorm(8, 6, 1), ConvNorm(6, 10, 3))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNorm(8, 12, 1))
        self.left = ConvNorm(26, 14, 1)
        self.right = ConvNorm(26, 14, 3)
        self.head = Head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.pool(x)], 1)
        return self.head(self.left(x) - self.right(x))


class ShuffleBlock(nn.Module):
    """Half of the channels pass by; the halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            ConvNorm(half, half, 1), ConvNorm(half, half, 3, groups=half), ConvNorm(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def shufflenet() -> nn.Module:
    """ShuffleNetV2: chunk, concatenate, channel shuffle."""
    return nn.Sequential(ConvNorm(3, 12, stride=2), ShuffleBlock(12), ShuffleBlock(12), Head(12))


class GroupShuffle(nn.Module):
    """ShuffleNetV1: grouped convolutions with a shuffle between."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 3
        self.stem = ConvNorm(3, 12)
        self.first = ConvNorm(12, 30, 1, groups=3)
        self.second = ConvNorm(30, 8, 1, groups=2)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.second(x))


def flattened() -> nn.Module:
    """A convolution whose feature map is flattened into a linear layer: one channel, 16 columns."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6 * 16, 10), nn.Tanh(), nn.Linear(10, 5),
    )  # fmt: skip


class PixelShuffle(nn.Module):
    """Super resolution: four channels become one of four times the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.up = nn.Conv2d(10, 24, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.out = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.leaky_relu(self.shuffle(self.up(F.relu(self.stem(x))))))


def group_norm() -> nn.Module:
    """Group norms: groups can be permuted, and channels within every group alike."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.SiLU(),
        nn.Conv2d(12, 10, 3, padding=1), nn.InstanceNorm2d(10, affine=True), nn.PReLU(10), Head(10),
    )  # fmt: skip


CONVOLUTIONAL = (
    Entry("resnet", ResNet, image()),
    Entry("mobilenet_v2", mobilenet, image(name="input")),
    Entry("efficientnet", efficientnet, image(name="input")),
    Entry("convnext", ConvNext, image()),
    Entry("densenet", densenet, image(name="input")),
    Entry("unet", UNet, image()),
    Entry("inception", Inception, image()),
    Entry("shufflenet_v2", shufflenet, image(name="input")),
    Entry("shufflenet_v1", GroupShuffle, image()),
    Entry("flattened", flattened, image(name="input")),
    Entry("pixel_shuffle", PixelShuffle, image()),
    Entry("group_norm", group_norm, image(name="input")),
)
