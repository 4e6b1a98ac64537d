"""Learned rounding: the error of a block falls, and what is written is rounded already."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.calibration.learned import LearnedWeight, gaps
from bittern.calibration.pieces import Pieces
from bittern.calibration.replay import BlockRun, Call
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, named_quantizers
from bittern.numerics import codec_of, measure
from bittern.records import Algorithm, PerChannel, PerGroup, QuantizerSpec
from bittern.toolkit import Toolkit

WIDTH, HIDDEN = 32, 64
FORMATS = ["int4", "int4-asym", "nvfp4", "mxfp4", "fp8"]


class Block(nn.Module):
    """A residual block that gets a keyword argument and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        inner = self.up(self.norm(x)).relu()
        return x + scale * self.down(inner), inner.argmax(-1), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=torch.full((), 0.5))[0]
        return x


def build() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def batches(count: int = 3, rows: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)  # inputs that depend on each other
    return [torch.randn(rows, 6, WIDTH, generator=generator) @ mix / 6 for _ in range(count)]


def recipe(weight: Any, algorithm: str = "learn-rounding", **options: Any) -> dict[str, Any]:
    steps = {"steps": 30, "rows": 8, **options} if algorithm == "learn-rounding" else options
    rule = {"match": {"class": "Linear"}, "weight": weight}
    return {"rules": [rule], "algorithm": [{"name": algorithm, "options": steps}]}


def int4(size: int = 16) -> dict[str, Any]:
    return {"format": "int4", "granularity": "group", "size": size}


def error(model: nn.Module, data: list[Tensor]) -> float:
    plain = build()
    with torch.no_grad():
        return sum(float((model(x) - plain(x)).square().sum()) for x in data)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("weight", FORMATS)
def test_the_error_falls_below_that_of_rounding_to_nearest(weight: str) -> None:
    data = batches()
    nearest, learned = build(), build()
    bt.quantize(nearest, recipe(weight, "mse"), data)
    bt.quantize(learned, recipe(weight), data)
    assert error(learned, data) < 0.8 * error(nearest, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", FORMATS)
def test_written_weights_are_rounded_already(weight: str, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    before = weights(model)
    bt.quantize(model, recipe(weight, steps=5), [x.to(dtype) for x in batches()])
    for path in ("layers.0.up", "layers.1.down"):
        module = model.get_submodule(path)
        assert isinstance(module, QuantModule)
        quantizer = module.quantizer("weight")
        assert quantizer is not None
        assert quantizer.calibrated
        assert quantizer.enabled
        value: Any = module.weight
        assert torch.equal(quantizer(value), value)
        assert not torch.equal(value, before[f"{path}.weight"])


@pytest.mark.parametrize("weight", [int4(), "nvfp4", "mxfp4"])
def test_numbers_before_they_are_rounded_round_to_the_same(weight: Any) -> None:
    rounded, waiting = build(), build()
    bt.quantize(rounded, recipe(weight, steps=20), batches())
    bt.quantize(waiting, recipe(weight, steps=20, rounded=False), batches())
    for path in ("layers.0.up", "layers.1.down"):
        one, other = rounded.get_submodule(path), waiting.get_submodule(path)
        assert isinstance(other, QuantModule)
        quantizer = other.quantizer("weight")
        assert quantizer is not None
        assert not torch.equal(other.weight, one.weight)
        same = quantizer(other.weight) == one.weight
        assert same.float().mean() > 0.999  # but for what lies in the middle between two


@pytest.mark.parametrize("name", ["int4", "int4-asym", "nvfp4", "mxfp4"])
def test_offsets_choose_between_the_neighbors_on_the_grid(name: str, toolkit: Toolkit) -> None:
    spec = QuantizerSpec(toolkit.registry.formats.get(name), PerGroup(16))
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    learned = LearnedWeight(weight, measure(weight, spec), spec)
    nearest = learned.hard()
    found = []
    for offset in (-0.49, 0.49):
        learned.offset.data.fill_(offset)
        found.append(learned.hard())
    low, high = found
    assert (low <= nearest).all()
    assert (nearest <= high).all()
    assert (low < high).float().mean() > 0.8  # but for those at the ends
    if name.startswith("int"):  # neighbors of floats are not equally far apart
        assert ((nearest == low) | (nearest == high)).all()
    learned.reset()
    assert torch.equal(learned.hard(), nearest)


@pytest.mark.parametrize("name", ["int4", "int4-asym", "nvfp4", "mxfp4", "fp8", "nf4"])
def test_gaps_are_the_distances_of_neighbors_on_the_grid(name: str, toolkit: Toolkit) -> None:
    codec = codec_of(toolkit.registry.formats.get(name))
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[:16] if name == "nf4" else codes
    every = codec.load(codes.view(codec.storage)).float()
    grid = every[every.isfinite() & (every >= codec.min_value) & (every <= codec.max_value)]
    if name in {"nvfp4", "mxfp4"}:
        grid = codec.load(codes[:16]).float()
    grid = grid.unique().double()
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    found = gaps(codec, middle)
    expected = grid.diff().float()
    found = found if isinstance(found, Tensor) else torch.full_like(middle, found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["int4", "int4-asym"])
def test_gradients_are_those_of_the_formula(name: str, toolkit: Toolkit) -> None:
    """Of a plain implementation in float64: rounding has the gradient of the identity."""
    spec = QuantizerSpec(toolkit.registry.formats.get(name), PerChannel(0))
    torch.manual_seed(3)
    weight = torch.randn(5, 12)
    values = measure(weight, spec)
    learned = LearnedWeight(weight, values, spec)
    learned.offset.data.uniform_(-0.4, 0.4)
    for clip in learned.clips:
        clip.data.fill_(0.7)
    out = torch.randn(5, 12)
    (learned() * out).sum().backward()  # type: ignore[no-untyped-call]

    def straight(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    offset = learned.offset.detach().double().requires_grad_()
    clips = [clip.detach().double().requires_grad_() for clip in learned.clips]
    high = values.amax.double() * clips[0]
    if values.amin is None:
        step, zero = high / 7, torch.zeros(())
    else:
        low = values.amin.double() * clips[1]
        step = (high - low) / 15
        zero = straight(-8 - low / step)
    code = (straight(weight.double() / step + offset) + zero).clamp(-8, 7)
    plain = (code - zero) * step
    (plain * out).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(learned().double(), plain, rtol=1e-5, atol=1e-6)
    assert learned.offset.grad is not None
    torch.testing.assert_close(learned.offset.grad.double(), offset.grad, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(learned.clips, clips, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_one_others() -> None:
    data, found = batches(), []
    for seed in (0, 0, 1):
        model = build()
        bt.quantize(model, recipe(int4(), steps=20, rows=2, seed=seed), data)
        found.append(weights(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_ranges_stay_where_they_are_without_clip() -> None:
    data = batches()
    start, learned = build(), build()
    fixed = recipe(int4(), clip=False)
    fixed["algorithm"].insert(0, "max")
    bt.quantize(start, recipe(int4(), "max"), data)
    bt.quantize(learned, fixed, data)
    for path in ("layers.0.up", "layers.1.down"):
        mine, theirs = (m.get_submodule(path) for m in (learned, start))
        assert torch.equal(mine.weight_quantizer.amax, theirs.weight_quantizer.amax)
        assert not torch.equal(mine.weight, theirs.weight)


def test_activations_that_are_quantized_are_made_up_for() -> None:
    data = batches()
    both = {"match": {"class": "Linear"}, "weight": "nvfp4", "input": "nvfp4"}
    found = []
    for name in ("mse", "learn-rounding"):
        model, config = build(), recipe("nvfp4", name)
        bt.quantize(model, {**config, "rules": [both]}, data)
        found.append(error(model, data))
    assert found[1] < 0.9 * found[0]


def test_the_second_format_of_a_chain_holds_what_the_first_was_rounded_to() -> None:
    model = build()
    chain = {**int4(), "then": "fp8"}
    bt.quantize(model, recipe(chain, steps=10), batches())
    module = model.get_submodule("layers.1.up")
    assert isinstance(module, QuantModule)
    quantizer = module.quantizer("weight")
    assert quantizer is not None
    assert quantizer.then is not None
    value: Any = module.weight
    assert torch.equal(quantizer(value), quantizer.then(value))
    assert quantizer.then.amax is not None
    assert torch.equal(quantizer.then.amax, value.abs().max())


def test_weights_in_no_block_get_their_range_and_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
    before = weights(model)
    bt.quantize(model, recipe(int4()), batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert all(q.calibrated for _, q in named_quantizers(model))


def test_gains_and_biases_are_learned_if_asked_for() -> None:
    data, before = batches(), weights(build())
    for norms in (False, True):
        model = build()
        bt.quantize(model, recipe(int4(), norms=norms), data)
        after = weights(model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.rpartition(".")[2] for name in changed} == (
            {"weight", "bias"} if norms else {"weight"}
        )
        assert ("layers.0.norm.weight" in changed) == norms


class Tokens(Model):
    """A model of token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(self.embedding(input_ids))


def test_padding_does_not_count() -> None:
    found = []
    for filler in (10, 11):
        torch.manual_seed(0)
        model = Tokens().eval()
        ids, mask = torch.randint(0, 10, (8, 6)), torch.ones(8, 6, dtype=torch.long)
        ids[:, 4:], mask[:, 4:] = filler, 0
        config = recipe(int4(), steps=8, rows=4)
        config["algorithm"].insert(0, "max")
        bt.quantize(model, config, [{"input_ids": ids, "attention_mask": mask}])
        found.append(weights(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_block_that_mixes_rows_is_given_whole_batches() -> None:
    class Mixing(Block):
        def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor, None]:
            y, inner, _ = super().forward(x - x.mean(0), scale=scale)
            seen.append(len(x))
            return y, inner, None

    seen: list[int] = []
    model = build()
    model.layers = nn.ModuleList(Mixing() for _ in range(2))
    bt.quantize(model, recipe(int4(), steps=3, rows=2), batches(rows=4))
    assert seen.count(4) > 2 * 3
    assert set(seen) <= {4, 1}  # one row was tried


def algorithms() -> list[Algorithm]:
    run = f"{__name__}:fail"
    return [Algorithm(name="fail", run=run, needs=frozenset({"hessian"}), sequential=True)]


def fail(model: nn.Module, plan: Any, forward: Any, context: Any) -> None:
    """Fail in the last block."""
    if "layers.1.up" in plan.modules:
        raise CalibrationError("no more")


def test_a_failure_later_puts_the_weights_back(
    make_plugin: Callable[..., ModuleType], toolkit_with: Callable[..., Toolkit]
) -> None:
    toolkit = toolkit_with(make_plugin("alpha", register_algorithms=algorithms))
    model = build()
    before = weights(model)
    config = recipe(int4(), steps=3, norms=True)
    config["algorithm"].append("fail")
    with pytest.raises(CalibrationError, match="no more"):
        bt.quantize(model, config, batches(), toolkit=toolkit)
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [{"steps": 0}, {"rows": 0}, {"lr": -1.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"step"):
        bt.quantize(build(), recipe(int4(), **options), batches())


def test_what_was_learned_is_judged_by_rows_that_were_not_seen() -> None:
    torch.manual_seed(0)
    calls = [Call((torch.randn(size, 8),), {}) for size in (6, 10, 5)]
    pieces = Pieces(BlockRun("", nn.Linear(8, 8), calls), rows=3, seed=0)
    held = {(p.call, int(r)) for step in pieces.checks(99) for p in step for r in p.rows}
    taught = set()
    for _, step in zip(range(40), pieces, strict=False):
        taught |= {
            (p.call, r)
            for p in step
            for r in (p.rows.tolist() if p.rows is not None else range(len(calls[p.call].args[0])))
        }
    assert len(held) == 21 // 8
    assert not held & taught
    assert len(held | taught) == 21


def test_few_rows_are_all_learned_from() -> None:
    pieces = Pieces(BlockRun("", nn.Linear(8, 8), [Call((torch.randn(4, 8),), {})]), rows=2, seed=0)
    assert sum(len(p.rows) for step in pieces.checks(2) for p in step) == 4
