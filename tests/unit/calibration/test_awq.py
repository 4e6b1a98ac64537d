"""AWQ: the scale and the clip are those that brute force over the tokens finds, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import CalibrationError
from bittern.nn import QuantModule, named_quantizers, quantizers_off
from bittern.toolkit import Toolkit

WIDTH, INNER, GROUP = 24, 40, 16  # neither is a multiple of the group


class Gated(nn.Module):
    """A norm whose scale can move, read by two linears; a third reads what none can scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down((self.gate(h) + self.up(h)).tanh())


@torch.no_grad()
def gated() -> nn.Module:
    torch.manual_seed(0)
    model = Gated().eval()
    model.norm.weight.mul_(torch.logspace(-0.5, 0.8, WIDTH)[torch.randperm(WIDTH)])
    model.up.weight[:, 5] *= 6
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 7, WIDTH, generator=generator) for _ in range(4)]


def recipe(weight: Any = "int4", **options: Any) -> dict[str, Any]:
    size = {} if weight != "int4" else {"granularity": "group", "size": GROUP}
    rules: list[dict[str, Any]] = [
        {"match": {"class": "Linear"}, "weight": {"format": weight, **size}}
    ]
    return {"extends": "base", "rules": rules, "algorithm": {"awq": options}}


def rounded(weight: Tensor, clips: Tensor | float = 1.0) -> Tensor:
    """Return int4 in groups, float64, with the range of each group times its clip."""
    out, count = len(weight), -(-weight.shape[1] // GROUP)
    padded = torch.zeros(out, count * GROUP, dtype=torch.float64)
    padded[:, : weight.shape[1]] = weight
    groups = padded.view(out, count, GROUP)
    step = groups.abs().amax(-1, keepdim=True) * torch.as_tensor(clips)[..., None] / 7
    codes = (groups / step).round().clamp(-8, 7)
    return (codes * step).view(out, -1)[:, : weight.shape[1]]


def tokens(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.norm(x).reshape(-1, WIDTH) for x in batches()]).double()


def best_scale(x: Tensor, weights: Sequence[Tensor], *, steps: int) -> Tensor:
    """Return the scale with the least error of all outputs, tried token by token."""
    shares = []
    for w in weights:
        padded = torch.zeros(len(w), -(-WIDTH // GROUP) * GROUP, dtype=torch.float64)
        padded[:, :WIDTH] = w.abs()
        largest = padded.view(len(w), -1, GROUP).amax(-1).repeat_interleave(GROUP, 1)[:, :WIDTH]
        shares.append((w.abs() / largest).mean(0))
    inputs, sizes = x.square().mean(0).sqrt(), torch.stack(shares).mean(0)
    candidates = [torch.ones(WIDTH, dtype=torch.float64)]
    for step in range(steps + 1):
        found = inputs ** (step / steps) / sizes ** (1 - step / steps)
        candidates.append(found / (found.max() * found.min()).sqrt())
    errors = [
        sum(float(((x / s) @ rounded(w * s).T - x @ w.T).square().sum()) for w in weights)
        for s in candidates
    ]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def test_the_scale_is_that_of_brute_force_over_the_tokens(toolkit: Toolkit) -> None:
    model = gated()
    norm = model.norm.weight.detach().clone()
    x, weights = tokens(model), [model.gate.weight.double(), model.up.weight.double()]
    toolkit.quantize(model, recipe(clip=False, steps=10), batches())
    expected = best_scale(x, [w.detach() for w in weights], steps=10)
    assert expected.std() > 0.1  # not the neutral one
    torch.testing.assert_close((norm / model.norm.weight).double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        model.gate.weight.double(), weights[0].detach() * expected, rtol=1e-4, atol=1e-7
    )


def test_the_clip_is_that_of_brute_force_over_the_tokens(toolkit: Toolkit) -> None:
    model = gated()
    x, weight = tokens(model), model.gate.weight.detach().double()
    toolkit.quantize(model, recipe(scale=False), batches())
    quantizer = model.gate.quantizer("weight")
    count = quantizer.range.amax.shape[1]
    candidates = [2 ** (-step / 16) for step in range(17)]
    errors = torch.empty(len(candidates), INNER, count, dtype=torch.float64)
    for i, clip in enumerate(candidates):
        change = rounded(weight, torch.full((INNER, count), clip, dtype=torch.float64)) - weight
        for group in range(count):
            part = slice(group * GROUP, (group + 1) * GROUP)
            errors[i, :, group] = (change[:, part] @ x[:, part].T).square().sum(1)
    parts = weight.abs().split(GROUP, 1)
    largest = torch.stack([part.amax(1) for part in parts], 1)
    chosen = (quantizer.range.amax.double() / largest).log2().mul(-16).round().long()
    spent = errors.gather(0, chosen[None])[0]
    torch.testing.assert_close(spent, errors.amin(0), rtol=1e-3, atol=1e-9)
    assert (chosen > 0).float().mean() > 0.2


def test_one_batch_of_eight_is_four_of_two(toolkit: Toolkit) -> None:
    for weight in ("int4", "nvfp4"):
        one, four = gated(), gated()
        toolkit.quantize(one, recipe(weight), [torch.cat(batches())])
        toolkit.quantize(four, recipe(weight), batches())
        for (name, a), (_, b) in zip(one.named_parameters(), four.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("weight", ["int4", "nvfp4", "fp8"])
def test_the_function_stays_and_the_error_falls(weight: str, toolkit: Toolkit) -> None:
    data, expected = batches(), [gated()(x).detach() for x in batches()]

    def error(algorithm: Any) -> float:
        model = gated()
        toolkit.quantize(model, {**recipe(weight), "algorithm": algorithm}, data)
        with torch.no_grad():
            with quantizers_off(model):
                torch.testing.assert_close(model(data[0]), expected[0], rtol=1e-4, atol=1e-5)
            pairs = zip(data, expected, strict=True)
            return sum(float((model(x) - y).square().sum()) for x, y in pairs)

    assert error("awq") < (1.0 if weight == "fp8" else 0.8) * error("max")


def test_inputs_that_are_rounded_count_and_are_scaled_where_nobody_makes_them(
    toolkit: Toolkit,
) -> None:
    weight = {"format": "int4", "granularity": "group", "size": GROUP}
    rule = {"match": {"class": "Linear"}, "weight": weight, "input": "nvfp4"}
    model, plain, data = gated(), gated(), batches()
    with torch.no_grad():
        for one in (model, plain):
            one.down.weight[:, ::GROUP] *= 20
    toolkit.quantize(model, {"extends": "base", "rules": [rule], "algorithm": "awq"}, data)
    inputs = {name: q for name, q in named_quantizers(model) if name.endswith(".input")}
    assert all(q.calibrated for q in inputs.values())
    assert inputs["gate.input"].transforms is None  # in the norm
    assert inputs["down.input"].transforms.pre_scale is not None
    with torch.no_grad(), quantizers_off(model):
        torch.testing.assert_close(model(data[0]), plain(data[0]), rtol=1e-4, atol=1e-5)


def test_without_input_quantizers_none_appears(
    toolkit: Toolkit, caplog: pytest.LogCaptureFixture
) -> None:
    model = gated()
    down = model.down.weight.detach().clone()
    with caplog.at_level("INFO", logger="bittern.calibration"):
        toolkit.quantize(model, recipe(), batches())
    assert not any(name.endswith(".input") for name, _ in named_quantizers(model))
    assert torch.equal(model.down.weight, down)
    assert "not scaled, for want of a producer: down" in caplog.text


def test_a_linear_that_never_runs_keeps_its_weight_at_max(toolkit: Toolkit) -> None:
    model = nn.ModuleDict({"used": gated(), "idle": nn.Linear(WIDTH, 4)}).eval()
    model.forward = model["used"].forward  # type: ignore[method-assign, assignment]
    weight = model["idle"].weight.detach().clone()
    toolkit.quantize(model, recipe(), batches())
    idle = model["idle"]
    assert isinstance(idle, QuantModule)
    assert torch.equal(idle.weight, weight)
    largest = weight[:, :GROUP].abs().amax(1)
    assert torch.equal(idle.quantizer("weight").range.amax[:, 0], largest)


def test_a_later_failure_leaves_the_model_as_it_was(toolkit: Toolkit) -> None:
    model = gated()
    before = copy.deepcopy(model.state_dict())
    steps = ["awq", {"percentile": {"p": 101}}]
    with pytest.raises(CalibrationError):
        toolkit.quantize(model, {**recipe(), "algorithm": steps}, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CHANNEL = {"weight": {"format": "int4", "granularity": "channel"}}
CHAINED = {"weight": [{"format": "int4", "granularity": "group", "size": GROUP}, "fp8"]}


@pytest.mark.parametrize("rule", [CHANNEL, CHAINED], ids=["per channel", "held in fp8"])
def test_grouped_convolutions_and_chains_are_clipped_too(
    rule: dict[str, Any], toolkit: Toolkit
) -> None:
    kinds = ["Linear", "Conv2d"] if rule is CHANNEL else ["Linear"]
    data = [torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))]

    def error(algorithm: str) -> float:
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64)]
        model = nn.Sequential(*layers).eval()
        rules = [{"match": {"class": kinds}, **rule}]
        with torch.no_grad():
            expected = model(data[0])
            toolkit.quantize(
                model, {"extends": "base", "rules": rules, "algorithm": algorithm}, data
            )
            assert all(q.calibrated for _, q in named_quantizers(model))
            return float((model(data[0]) - expected).square().sum())

    assert error("awq") < 0.9 * error("max")
