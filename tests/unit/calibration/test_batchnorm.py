"""BatchNorm folding: the function stays, weights take the scale, training brings nothing back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bittern as bt
from bittern.convert import plan_of
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers, quantizers_off
from bittern.nn.batchnorm import FoldedBatchNorm
from bittern.toolkit import Toolkit

FOLD = "int8-cnn"
SIZE = (4, 3, 9, 9)


# --- models ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block: ``relu(x + bn2(conv2(relu(bn1(conv1(x))))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(h)))


class Residual(nn.Module):
    """A small residual net with a BatchNorm after every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(h.mean(dim=(2, 3)))


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


# Everything that folds, by name: a model, and the shape of what it reads.
FOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, SIZE),
    "bias": (lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), SIZE),
    "groups": (lambda: chain(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), SIZE),
    "depthwise": (lambda: chain(nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.BatchNorm2d(3)), SIZE),
    "padded": (
        lambda: chain(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
        SIZE,
    ),
    "same": (lambda: chain(nn.Conv2d(3, 6, 3, padding="same"), nn.BatchNorm2d(6)), SIZE),
    "not affine": (
        lambda: chain(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)),
        SIZE,
    ),
    "not affine, bias": (lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)), SIZE),
    "large eps": (lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.3)), SIZE),
    "conv1d": (lambda: chain(nn.Conv1d(3, 6, 2), nn.BatchNorm1d(6)), (4, 3, 7)),
    "conv3d": (lambda: chain(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6)), (2, 2, 4, 4, 4)),
    "linear": (lambda: chain(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()), (16, 8)),
    "transposed": (lambda: chain(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6)), SIZE),
    "transposed, groups": (
        lambda: chain(nn.ConvTranspose2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)),
        (2, 6, 5, 5),
    ),
    "transposed, depthwise": (
        lambda: chain(nn.ConvTranspose1d(6, 6, 3, groups=6, bias=False), nn.BatchNorm1d(6)),
        (2, 6, 5),
    ),
    "synchronized": (lambda: chain(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)), SIZE),
}


@torch.no_grad()
def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose BatchNorms have statistics, gains and shifts as training leaves them."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, -2.0, 2.0),
                (module.bias, -1.0, 1.0),
                (module.running_mean, -1.0, 1.0),
                (module.running_var, 0.01, 4.0),
            ):
                if tensor is not None:
                    tensor.uniform_(low, high)
    return model


def images(*size: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*(size or SIZE), generator=generator) for _ in range(count)]


def norms(model: nn.Module) -> dict[str, Any]:
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def folded(model: nn.Module) -> set[str]:
    return {name for name, m in norms(model).items() if isinstance(m, FoldedBatchNorm)}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def unquantized(model: nn.Module, x: Tensor) -> Tensor:
    with quantizers_off(model):
        found: Tensor = model(x)
    return found


@pytest.fixture
def residual(toolkit: Toolkit) -> nn.Module:
    """A residual net, folded and quantized, in eval mode."""
    model = trained(Residual)
    toolkit.quantize(model, FOLD, images())
    return model


# --- what folding computes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_function_stays_and_every_batchnorm_is_folded(name: str, toolkit: Toolkit) -> None:
    make, size = FOLDABLE[name]
    model, x = trained(make), images(*size)
    before = {n: t.shape for n, t in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x[0])

    toolkit.quantize(model, FOLD, x)

    assert error(unquantized(model, x[0]), expected) < 2e-6
    assert folded(model) == set(norms(model))
    assert {n: t.shape for n, t in model.state_dict().items()} == before


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_batchnorm_only_adds_a_constant(name: str, toolkit: Toolkit) -> None:
    make, size = FOLDABLE[name]
    model = trained(make)
    toolkit.quantize(model, FOLD, images(*size))
    for norm in norms(model).values():
        x = torch.randn(2, norm.num_features, *size[2:])
        added = norm(x) - x
        constant = norm.bias if norm.affine else -norm.running_mean
        shape = (1, -1, *([1] * (x.dim() - 2)))
        torch.testing.assert_close(added, constant.reshape(shape).expand_as(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_weight_takes_gamma_over_the_standard_deviation(toolkit: Toolkit) -> None:
    model = trained(lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    conv, norm = copy.deepcopy(model)
    toolkit.quantize(model, FOLD, images())

    for c in range(6):
        scale = norm.weight[c] / torch.sqrt(norm.running_var[c] + norm.eps)
        torch.testing.assert_close(model[0].weight[c], conv.weight[c] * scale)
        torch.testing.assert_close(model[0].bias[c], conv.bias[c] * scale)
        shift = norm.bias[c] - scale * norm.running_mean[c]
        torch.testing.assert_close(model[1].bias[c], shift)


def test_weight_scales_are_those_of_the_folded_weight(toolkit: Toolkit) -> None:
    model = trained(lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    before = model[0].weight.detach().clone()
    toolkit.quantize(model, FOLD, images())
    amax = dict(named_quantizers(model))["0.weight"].amax
    assert amax is not None
    assert torch.equal(amax.flatten(), model[0].weight.detach().abs().amax(dim=(1, 2, 3)))
    assert not torch.allclose(amax.flatten(), before.abs().amax(dim=(1, 2, 3)))


@torch.no_grad()
def test_per_tensor_weights_profit_from_gains_that_folding_evens_out(toolkit: Toolkit) -> None:
    """Channels that a BatchNorm brings to one size are rounded alike only when it is folded."""

    def loss(algorithm: list[str]) -> float:
        model = trained(lambda: chain(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)))
        size = torch.logspace(-2, 0, 6)
        model[0].weight.mul_(size[:, None, None, None])
        model[1].running_mean.zero_()
        model[1].running_var.copy_(size.square())
        model[1].weight.fill_(1)
        x = images()
        expected = model(x[0])
        rule = {"match": "0", "weight": {"format": "int8", "granularity": "tensor"}}
        toolkit.quantize(model, {"rules": [rule], "algorithm": algorithm}, x)
        return error(model(x[0]), expected)

    assert loss(["fold-batchnorm", "max"]) < 0.1 * loss(["max"])


def test_half_precision_folds_to_its_own_rounding(toolkit: Toolkit) -> None:
    model = trained(Residual).bfloat16()
    x = [x.bfloat16() for x in images()]
    with torch.no_grad():
        expected = model(x[0])
    toolkit.quantize(model, FOLD, x)
    assert folded(model) == set(norms(model))
    assert error(unquantized(model, x[0]), expected) < 0.05


def test_quantizers_of_a_batchnorm_stay_and_are_calibrated_after_folding(toolkit: Toolkit) -> None:
    model = trained(lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    rules = [{"match": {"class": "BatchNorm2d"}, "output": "int8"}]
    toolkit.quantize(model, {"extends": FOLD, "rules": rules}, images())

    assert folded(model) == {"1"}
    amax = dict(named_quantizers(model))["1.output"].amax
    expected = max(float(unquantized(model, x).abs().max()) for x in images())
    assert amax is not None
    assert float(amax) == pytest.approx(expected)


def test_a_second_calibration_changes_no_weight(residual: nn.Module, toolkit: Toolkit) -> None:
    before = copy.deepcopy(residual.state_dict())
    toolkit.calibrate(residual, plan_of(residual), images())
    after = residual.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- what is left alone ---------------------------------------------------------------------------


class Read(nn.Module):
    """The output of the convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.norm(h) + h


class Returned(Read):
    """The output of the convolution is part of the model's."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(x)
        return self.norm(h), h


class Twice(Read):
    """One BatchNorm after two calls of one convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(-x))


class OneConvolution(Read):
    """A convolution that is called again, without a BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(-x).relu()


class Between(Read):
    """Something stands between the two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu())


class Idle(Read):
    """The BatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Tied(Read):
    """Two convolutions share a weight, and one of them does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 6, 3)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Tokens(nn.Module):
    """The BatchNorm's channels are the tokens, not the features that the linear layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Linear(9, 9), nn.BatchNorm1d(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x[:, 0]))


class Scaled(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Own(Read):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Scaled(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Untracked(Own):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)


class Computed(Own):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        nn.utils.parametrizations.weight_norm(self.conv)


class Replaced(Own):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.norm.forward = self.norm.forward  # type: ignore[method-assign]


LEFT: dict[type[nn.Module], str] = {
    Read: "the output of conv is read elsewhere, too",
    Returned: "the output of conv is read elsewhere, too",
    Twice: "it ran 2 times",
    OneConvolution: "conv.weight is used elsewhere, too",
    Between: "what it reads is not the output of a convolution or linear layer",
    Idle: "it ran 0 times",
    Tied: "conv.weight is used elsewhere, too",
    Tokens: "its channels are not the output channels of conv",
    Own: "Scaled has a forward of its own",
    Untracked: "it keeps no running statistics",
    Computed: "the weights of conv are computed",
    Replaced: "its forward was replaced on the object itself",
}


@pytest.mark.parametrize("cls", LEFT)
def test_what_cannot_be_proven_is_left_alone_and_the_log_says_why(
    cls: type[nn.Module], toolkit: Toolkit, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(cls)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, "bittern.calibration"):
        toolkit.quantize(model, FOLD, images())

    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert folded(model) == set()
    assert f"not folded: norm ({LEFT[cls]})" in caplog.text


def test_the_log_names_what_was_folded(toolkit: Toolkit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bittern.calibration"):
        toolkit.quantize(trained(Residual), FOLD, images())
    assert "folded into the layers before them: bn, blocks.0.bn1, blocks.0.bn2" in caplog.text


def test_two_models_that_share_a_batchnorm_by_two_names(toolkit: Toolkit) -> None:
    norm = nn.BatchNorm2d(6)
    model = trained(lambda: chain(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 6, 3), norm))
    with torch.no_grad():
        expected = model(images()[0])
    toolkit.quantize(model, FOLD, images())
    assert folded(model) == set()
    assert torch.equal(unquantized(model, images()[0]), expected)


# --- errors ---------------------------------------------------------------------------------------


def _iterator() -> Iterator[Tensor]:
    yield from images()


def test_data_that_the_model_cannot_be_traced_on(toolkit: Toolkit) -> None:
    with pytest.raises(CalibrationError, match="a batch that the model can be traced on"):
        toolkit.quantize(trained(Residual), FOLD, _iterator())


def test_a_model_without_batchnorms_needs_no_trace(toolkit: Toolkit) -> None:
    model = trained(lambda: chain(nn.Conv2d(3, 6, 3), nn.ReLU()))
    toolkit.quantize(model, FOLD, _iterator())
    assert all(quantizer.calibrated for _, quantizer in named_quantizers(model))


def test_ranges_that_were_taken_before_are_refused(toolkit: Toolkit) -> None:
    model = trained(Residual)
    before = copy.deepcopy(model.state_dict())
    recipe = {"extends": FOLD, "algorithm": ["max", "fold-batchnorm"]}
    with pytest.raises(CalibrationError, match="no step after it") as caught:
        toolkit.quantize(model, recipe, images())
    assert "put it first" in (caught.value.hint or "")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@torch.no_grad()
def test_a_later_step_that_fails_unfolds_everything(toolkit: Toolkit) -> None:
    model = trained(Residual)
    before = copy.deepcopy(model.state_dict())
    data = [*images(), images()[0] * float("nan")]
    with pytest.raises(CalibrationError, match="NaN or Inf in batch 2"):
        toolkit.quantize(model, FOLD, data)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert {type(norm) for norm in norms(model).values()} == {nn.BatchNorm2d}
    assert all(p.requires_grad for p in model.parameters())


def test_a_recalibration_that_fails_leaves_a_folded_model_folded(
    residual: nn.Module, toolkit: Toolkit
) -> None:
    before = copy.deepcopy(residual.state_dict())
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        toolkit.calibrate(residual, plan_of(residual), [images()[0] * float("nan")])
    assert all(torch.equal(residual.state_dict()[name], before[name]) for name in before)
    assert folded(residual) == set(norms(residual))


# --- training, saving, reverting ------------------------------------------------------------------


def test_training_mode_brings_no_batch_statistics_back(residual: nn.Module) -> None:
    x = images()[0] * 3 + 1
    expected = residual(x)
    before = {n: b.clone() for n, b in residual.named_buffers() if "running" in n or "batches" in n}
    residual.train()
    found = residual(x)
    assert torch.equal(found, expected)
    assert all(torch.equal(dict(residual.named_buffers())[n], b) for n, b in before.items())


def test_training_learns_weights_and_constants_and_no_gain(residual: nn.Module) -> None:
    residual.train()
    optimizer = torch.optim.AdamW(residual.parameters(), lr=0.01, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in residual.named_parameters()}
    residual(images()[0]).square().mean().backward()
    optimizer.step()
    changed = {n for n, p in residual.named_parameters() if not torch.equal(p, before[n])}
    gains = {f"{name}.weight" for name in norms(residual)}
    assert changed == set(before) - gains
    assert [n for n, p in residual.named_parameters() if not p.requires_grad] == [
        n for n in before if n in gains
    ]


def test_training_a_folded_model_reduces_its_loss(residual: nn.Module) -> None:
    x, labels = images()[0], torch.tensor([0, 1, 2, 3])
    residual.train()
    optimizer = torch.optim.Adam(residual.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(residual(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_restored_model_has_the_same_bits_and_stays_folded_in_training(
    residual: nn.Module, tmp_path: Path
) -> None:
    x = images()[0]
    bt.save(residual, tmp_path / "state")
    fresh = Residual().train()
    bt.restore(fresh, tmp_path / "state")

    assert folded(fresh) == folded(residual) == set(norms(residual))
    assert torch.equal(fresh(x), residual(x))
    assert [p.requires_grad for p in fresh.parameters()] == [
        p.requires_grad for p in residual.parameters()
    ]


def test_smoothing_after_folding_does_not_bring_batch_statistics_back(
    toolkit: Toolkit, tmp_path: Path
) -> None:
    model = trained(Residual)
    x = images()[0]
    with torch.no_grad():
        expected = model(x)
    recipe = {"extends": FOLD, "algorithm": ["fold-batchnorm", "smooth", "max"]}
    toolkit.quantize(model, recipe, images())
    toolkit.save(model, tmp_path / "state")
    fresh = Residual().train()
    toolkit.restore(fresh, tmp_path / "state")
    assert error(unquantized(model, x), expected) < 2e-6
    assert folded(fresh) == set(norms(model))
    assert torch.equal(fresh(x), model(x))


def test_restoring_freezes_only_what_was_folded(toolkit: Toolkit, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))

    model = trained(make)
    toolkit.quantize(model, FOLD, images())
    toolkit.save(model, tmp_path / "state")
    fresh = make()
    toolkit.restore(fresh, tmp_path / "state")
    assert folded(fresh) == folded(model) == {"1"}


def test_reverting_gives_the_classes_back_and_keeps_the_function(residual: nn.Module) -> None:
    x = images()[0]
    expected = unquantized(residual, x)
    bt.revert(residual)
    assert {type(norm) for norm in norms(residual).values()} == {nn.BatchNorm2d}
    with torch.no_grad():
        assert torch.equal(residual(x), expected)


def test_a_reverted_model_is_folded_again_without_a_change(
    residual: nn.Module, toolkit: Toolkit
) -> None:
    x = images()[0]
    bt.revert(residual)
    with torch.no_grad():
        expected = residual(x)
    toolkit.quantize(residual, FOLD, images())
    assert folded(residual) == set(norms(residual))
    assert error(unquantized(residual, x), expected) < 1e-6
