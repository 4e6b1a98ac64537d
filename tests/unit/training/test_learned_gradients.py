"""Gradients of learned ranges against the formulas of LSQ, and against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.nn import TensorQuantizer
from bittern.numerics import Range, amax, fake_quantize, scales_for
from bittern.numerics.autograd import is_learnable, learned_range
from bittern.records import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, QuantizerSpec
from bittern.toolkit import Toolkit

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(-1), PerGroup(4), PerBlock(2, 4)]
FORMATS = ["int8", "int4", "uint8", "fp8", "fp8-e5m2", "nf4"]


@pytest.fixture(scope="module")
def formats(toolkit: Toolkit) -> Callable[[str], Any]:
    return toolkit.registry.formats.get


def make_x(*, signed: bool = True) -> Tensor:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    return x if signed else x.abs()


def index_of(i: int, j: int, granularity: Granularity) -> tuple[int, ...]:
    """Return where the range of an element lies."""
    match granularity:
        case PerChannel(axis=0):
            return (i, 0)
        case PerChannel():
            return (0, j)
        case PerGroup(size=size):
            return (i, j // size)
        case PerBlock(rows=rows, cols=cols):
            return (i // rows, j // cols)
    return ()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_of_a_range_is_that_of_the_paper(
    name: str, granularity: Granularity, formats: Any
) -> None:
    if name == "nf4" and not isinstance(granularity, PerGroup | PerBlock):
        granularity = PerGroup(5)
    spec = QuantizerSpec(formats(name), granularity)
    quantizer = TensorQuantizer(spec)
    codec = quantizer.codec
    x = make_x(signed=codec.signed)
    ranges = (amax(x, granularity) * 0.6).requires_grad_()
    upstream = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))

    found = learned_range(x, ranges, spec)
    (found * upstream).sum().backward()

    values = found.detach()
    scales = scales_for(Range(ranges.detach()), spec)
    assert torch.equal(values, fake_quantize(x, spec, scales))
    # Equations 3 and 5, element by element, in units of the step; then its scale (section 2.2), and
    # the way from the step to the range, which is max_value times as large and moves along.
    expected = torch.zeros_like(ranges.detach())
    count = torch.zeros_like(expected)
    for i in range(6):
        for j in range(10):
            at = index_of(i, j, granularity)
            step = float(ranges.detach()[at]) / codec.max_value
            v = float(x[i, j]) / step
            if v > codec.max_value:
                slope = codec.max_value
            elif v < codec.min_value:
                slope = codec.min_value
            else:
                slope = float(values[i, j]) / step - v
            expected[at] += float(upstream[i, j]) * slope / codec.max_value
            count[at] += 1
    codes = 2 ** (spec.format.bits - codec.signed) - 1
    per_range = 60 / expected.numel()
    expected *= codes**2 / (per_range * codes) ** 0.5
    assert ranges.grad is not None
    torch.testing.assert_close(ranges.grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_it_is_the_slope_of_the_surrogate_with_rounding_held(name: str, formats: Any) -> None:
    """Of s * (clamp(x / s) + c), where c is what rounding adds: by finite differences."""
    spec = QuantizerSpec(formats(name), PerTensor())
    codec = TensorQuantizer(spec).codec
    x, level = make_x().double(), 1.1
    step = level / codec.max_value
    scaled = (x / step).clamp(codec.min_value, codec.max_value)
    added = codec.round_(scaled.float().clone()).double() - scaled

    def surrogate(at: float) -> Tensor:
        s = at / codec.max_value
        return (((x / s).clamp(codec.min_value, codec.max_value) + added) * s).sum()

    slope = float(surrogate(level + 1e-6) - surrogate(level - 1e-6)) / 2e-6
    ranges = torch.tensor(level, requires_grad=True)
    learned_range(x.float(), ranges, spec).sum().backward()

    codes = 2 ** (spec.format.bits - 1) - 1
    assert ranges.grad is not None
    assert float(ranges.grad) == pytest.approx(slope * codes**1.5 / 60**0.5, rel=2e-3)


def test_descent_moves_the_step_as_lsq_does(formats: Any) -> None:
    spec = QuantizerSpec(formats("int4"), PerTensor())
    x = make_x()
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.set_amax(torch.tensor(1.1))
    learned = quantizer.learn()
    optimizer = torch.optim.SGD([learned], lr=0.01)
    (quantizer(x) - x).square().sum().backward()
    optimizer.step()

    s = torch.tensor(1.1 / 7, requires_grad=True)  # the paper's, section 2.1 to 2.3, as it stands
    v = x / s
    clipped = v.clamp(-8, 7)
    y = (clipped + (clipped.round() - clipped).detach()) * s
    (y - x).square().sum().backward()
    assert s.grad is not None
    wanted = s.detach() - 0.01 * s.grad / (60 * 7) ** 0.5
    assert float(learned.detach()) / 7 == pytest.approx(float(wanted), rel=1e-4)


def test_the_largest_element_is_within_its_own_range(formats: Any) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor())
    for seed in range(50):  # 127 * (amax / 127) is below amax for some
        x = torch.randn(64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        learned_range(x, x.detach().abs().max(), spec).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [1.0] * 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits_and_its_range_float32(dtype: Any, formats: Any) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor())
    x = make_x().to(dtype).requires_grad_()
    ranges = torch.tensor(1.3, requires_grad=True)
    found = learned_range(x, ranges, spec)
    found.float().sum().backward()
    assert torch.equal(found, fake_quantize(x, spec, scales_for(Range(torch.tensor(1.3)), spec)))
    assert x.grad is not None
    assert ranges.grad is not None
    assert (x.grad.dtype, ranges.grad.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(
    ("name", "granularity", "known"),
    [
        ("int8", PerTensor(), True),
        ("fp8", PerChannel(0), True),
        ("int4", PerGroup(4), True),
        ("nf4", PerGroup(4), True),
        ("int8-asym", PerTensor(), False),
        ("nvfp4", PerGroup(16), False),
        ("nvfp4-four-over-six", PerGroup(16), False),
        ("mxfp8", PerGroup(32), False),
        ("mxint8", PerGroup(32), False),
    ],
)
def test_formats_whose_scales_are_rounded_are_refused(
    name: str, granularity: Granularity, *, known: bool, formats: Any
) -> None:
    assert is_learnable(QuantizerSpec(formats(name), granularity)) is known


# --- the parameter --------------------------------------------------------------------------------


def make_learned(formats: Any) -> TensorQuantizer:
    quantizer = TensorQuantizer(QuantizerSpec(formats("int8"), PerTensor()), tensor="weight")
    quantizer.set_amax(torch.tensor(1.5))
    quantizer.learn()
    return quantizer


def test_a_learned_range_has_a_dimension_to_shard(formats: Any) -> None:
    quantizer = make_learned(formats)
    assert quantizer.learned is not None
    assert quantizer.learned.shape == (1,)
    assert quantizer.range is not None
    assert quantizer.range.amax.shape == ()
    assert quantizer.learn() is quantizer.learned


def test_a_restored_range_trains_on(formats: Any) -> None:
    quantizer = make_learned(formats)
    again = TensorQuantizer(quantizer.spec, tensor="weight")
    again.load_state(quantizer.state())
    x = make_x()
    assert again.learned is not None
    assert torch.equal(again(x), quantizer(x))
    again(x).sum().backward()
    assert again.learned.grad is not None


def test_a_static_state_makes_a_learned_range_static_again(formats: Any) -> None:
    quantizer = make_learned(formats)
    static = TensorQuantizer(quantizer.spec, tensor="weight")
    static.set_amax(torch.tensor(0.5))
    quantizer.load_state(static.state())
    assert quantizer.learned is None
    assert torch.equal(quantizer(make_x()), static(make_x()))


def test_a_learned_range_stays_float32_in_a_model_of_half_precision(formats: Any) -> None:
    holder = nn.Module()
    holder.inner = make_learned(formats)
    before = holder.inner.learned
    holder.bfloat16()
    assert holder.inner.learned is before
    assert before.dtype == torch.float32
    assert float(before.detach()) == 1.5


def test_a_copy_learns_on_its_own(formats: Any) -> None:
    quantizer = make_learned(formats)
    other = copy.deepcopy(quantizer)
    with torch.no_grad():
        assert other.learned is not None
        other.learned.mul_(2)
    assert quantizer.range is not None
    assert float(quantizer.range.amax) == 1.5


def test_the_state_dict_of_the_plain_model_still_loads(formats: Any) -> None:
    model = nn.Linear(3, 3)
    plain = copy.deepcopy(model.state_dict())
    model.weight_quantizer = make_learned(formats)
    model.load_state_dict(plain)  # strict
    assert float(model.weight_quantizer.learned.detach()) == 1.5
    model.load_state_dict({**plain, "weight_quantizer.amax": torch.tensor([2.0])})
    assert float(model.weight_quantizer.learned.detach()) == 2.0
