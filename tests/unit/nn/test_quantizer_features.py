"""What a quantizer does besides rounding: chains, experts, caches, learned ranges, backends."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import NumericsError
from bittern.nn import Experts, TensorQuantizer
from bittern.numerics import Range, amax, fake_quantize, measure, scales_for
from bittern.records import (
    Affine,
    KernelRule,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Rotation,
)
from bittern.registry import KernelTable
from bittern.toolkit import Toolkit


@pytest.fixture(scope="module")
def formats() -> Callable[[str], NumberFormat]:
    table = Toolkit().registry.formats
    return table.get


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- chains (W4A8's weight) -----------------------------------------------------------------------


def test_a_chain_quantizes_what_the_link_before_made(formats: Any, x: Tensor) -> None:
    second = QuantizerSpec(formats("fp8"), PerTensor())
    first = QuantizerSpec(formats("int4"), PerGroup(16), then=second)
    quantizer = TensorQuantizer(first, name="up.weight", tensor="weight")
    quantizer.calibrate_on(x)

    middle = fake_quantize(x, QuantizerSpec(formats("int4"), PerGroup(16)))
    assert torch.equal(quantizer(x), fake_quantize(middle, second))
    assert [link.name for link in quantizer.chain()] == ["up.weight", "up.weight.then"]


def test_a_chain_is_calibrated_only_as_a_whole(formats: Any, x: Tensor) -> None:
    second = QuantizerSpec(formats("fp8"), PerTensor())
    quantizer = TensorQuantizer(QuantizerSpec(formats("int4"), PerTensor(), then=second))
    quantizer.set_amax(torch.tensor(1.0))
    assert not quantizer.calibrated
    quantizer.then.set_amax(torch.tensor(1.0))  # type: ignore[union-attr]
    assert quantizer.calibrated


# --- experts --------------------------------------------------------------------------------------


def test_rows_are_quantized_with_the_range_of_their_expert(formats: Any, x: Tensor) -> None:
    index = torch.tensor([2, 0, 0, 2, 1, 2])
    spec = QuantizerSpec(formats("int8"), PerTensor(), stacked=True)
    quantizer = TensorQuantizer(spec, name="experts.down_input")
    quantizer.set_amax(torch.tensor([0.5, 1.0, 3.0, 9.0]))

    found = quantizer(x, Experts(index, 4))
    for row, expert in enumerate(index.tolist()):
        alone = QuantizerSpec(formats("int8"), PerTensor())
        limit = [0.5, 1.0, 3.0, 9.0][expert]
        expected = fake_quantize(x[row], alone, scales_for(Range(torch.tensor(limit)), alone))
        assert torch.equal(found[row], expected)


def test_gradients_are_clipped_at_the_range_of_the_rows_expert(formats: Any) -> None:
    quantizer = TensorQuantizer(QuantizerSpec(formats("int8"), PerTensor(), stacked=True))
    quantizer.set_amax(torch.tensor([1.0, 4.0]))
    x = torch.full((2, 3), 2.0, requires_grad=True)
    quantizer(x, Experts(torch.tensor([0, 1]), 2)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0] * 3, [1.0] * 3]


def test_without_experts_a_stacked_one_says_who_must_name_them(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor(), stacked=True)
    quantizer = TensorQuantizer(spec, name="experts.down_input")
    quantizer.set_amax(torch.ones(4))
    with pytest.raises(NumericsError, match=r"experts\.down_input: .*one per expert"):
        quantizer(x)


# --- formats of two levels ------------------------------------------------------------------------


def test_a_static_activation_of_two_levels_keeps_its_global_scale(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("nvfp4"), PerGroup(16))
    quantizer = TensorQuantizer(spec)
    assert not quantizer.calibrated
    quantizer.set_amax(amax(x, PerTensor()) * 4)

    for part in (x, x / 2):  # the block scales follow the tensor, the global one does not
        whole = Range(amax(part, PerGroup(16)), global_amax=amax(x, PerTensor()) * 4)
        assert torch.equal(quantizer(part), fake_quantize(part, spec, scales_for(whole, spec)))


def test_every_stacked_weight_has_a_global_scale_of_its_own(formats: Any) -> None:
    weights = torch.randn(3, 8, 32) * torch.tensor([1.0, 50.0, 0.01]).reshape(3, 1, 1)
    spec = QuantizerSpec(formats("nvfp4"), PerGroup(16), stacked=True)
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(weights)

    alone = QuantizerSpec(formats("nvfp4"), PerGroup(16))
    expected = torch.stack([fake_quantize(weight, alone) for weight in weights])
    assert torch.equal(quantizer(weights), expected)


# --- pre-scale, rotation, bias --------------------------------------------------------------------


def test_a_pre_scale_is_part_of_the_model_and_stays_while_disabled(formats: Any, x: Tensor) -> None:
    quantizer = TensorQuantizer(QuantizerSpec(formats("int8"), PerToken(), dynamic=True))
    factors = torch.linspace(0.5, 2, 64)
    quantizer.set_pre_scale(factors)
    assert relative(quantizer(x), x * factors) < 0.02
    quantizer.enabled = False
    assert torch.equal(quantizer(x), x * factors)


@pytest.mark.parametrize("block", [None, 16])
def test_rotating_input_and_weight_alike_changes_no_product(
    block: int | None, formats: Any, x: Tensor
) -> None:
    spec = QuantizerSpec(
        formats("int8"), PerTensor(), rotation=Rotation(block=block), constant_amax=1.0
    )
    weight = torch.randn(5, 64)
    left, right = TensorQuantizer(spec), TensorQuantizer(spec, tensor="weight")
    left.enabled = right.enabled = False
    assert not torch.allclose(left(x), x, atol=0.1)
    assert torch.allclose(left(x) @ right(weight).mT, x @ weight.mT, atol=1e-4)


def test_rotating_twice_is_the_identity(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor(), rotation=Rotation())
    quantizer = TensorQuantizer(spec)
    assert torch.allclose(quantizer(quantizer(x)), x, atol=1e-5)


def test_one_that_rotates_back_is_the_identity_while_disabled(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor(), rotation=Rotation(back=True))
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(x)
    assert 0 < relative(quantizer(x), x) < 0.02
    quantizer.enabled = False
    assert quantizer(x) is x


def test_a_rotation_spreads_an_outlier(formats: Any, x: Tensor) -> None:
    x = x.clone()
    x[:, 3] *= 100
    errors = {}
    for rotation in (None, Rotation(back=True)):
        spec = QuantizerSpec(formats("int4"), PerTensor(), rotation=rotation)
        quantizer = TensorQuantizer(spec, tensor="weight")
        quantizer.calibrate_on(x)
        errors[rotation] = float((quantizer(x) - x)[:, [0, 1, 2, 4]].norm())
    plain, rotated = errors.values()
    assert rotated != plain
    assert relative(quantizer(x), x) < 0.25


def test_a_given_rotation_must_be_orthogonal_and_is_undone_by_its_transpose(
    formats: Any, x: Tensor
) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor(), rotation=Rotation(kind="given", back=True))
    quantizer = TensorQuantizer(spec, name="up.weight", tensor="weight")
    with pytest.raises(NumericsError, match=r"up\.weight: the matrix is not orthogonal"):
        quantizer.set_rotation(torch.ones(8, 8))
    with pytest.raises(NumericsError, match="is to be given"):
        quantizer.calibrate_on(x)
    orthogonal, _ = torch.linalg.qr(torch.randn(8, 8))
    quantizer.set_rotation(orthogonal)
    quantizer.calibrate_on(x)
    assert relative(quantizer(x), x) < 0.02


def test_columns_that_do_not_divide_cannot_be_rotated(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor(), rotation=Rotation(block=48))
    with pytest.raises(NumericsError, match="64 columns do not divide into blocks of 48"):
        TensorQuantizer(spec)(x)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [((-1,), (1, 1, 1, 6)), ((-1, -3), (1, 4, 1, 6)), ((-1, -2, -3), (1, 4, 5, 6))],
)
@pytest.mark.parametrize("method", ["mean", "mid"])
def test_a_bias_has_its_axes_and_keeps_the_shape(
    axes: tuple[int, ...], shape: tuple[int, ...], method: str, formats: Any
) -> None:
    x = torch.randn(3, 4, 5, 6) + torch.arange(6) * 10
    spec = QuantizerSpec(formats("int4"), PerTensor(), affine=Affine(axes=axes, method=method))
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(x)

    bias = quantizer.transforms.bias  # type: ignore[union-attr]
    assert bias is not None
    assert tuple(bias.shape) == shape
    keep = {axis % 4 for axis in axes}
    dims = [dim for dim in range(4) if dim not in keep]
    expected = (
        x.mean(dims, True) if method == "mean" else (x.amax(dims, True) + x.amin(dims, True)) / 2
    )
    assert torch.allclose(bias, expected, atol=1e-5)
    assert quantizer(x).shape == x.shape
    assert relative(quantizer(x), x) < relative(_plain(formats, x), x) / 2


def _plain(formats: Any, x: Tensor) -> Tensor:
    return fake_quantize(x, QuantizerSpec(formats("int4"), PerTensor()))


def test_a_static_bias_refuses_tensors_of_another_rank(formats: Any) -> None:
    spec = QuantizerSpec(formats("int8"), PerTensor(), affine=Affine())
    quantizer = TensorQuantizer(spec, name="k")
    quantizer.calibrate_on(torch.randn(2, 3, 4))
    with pytest.raises(NumericsError, match="k: its bias is for tensors with 3 dimensions, not 2"):
        quantizer(torch.randn(3, 4))


# --- frozen weights -------------------------------------------------------------------------------


CALLS: list[torch.Size] = []


def counting(x: Tensor, spec: QuantizerSpec, scales: Any) -> Tensor:
    """A kernel that says when it was asked."""
    CALLS.append(x.shape)
    return fake_quantize(x, spec, scales)


def counted(formats: Any, weight: Tensor) -> TensorQuantizer:
    rule = KernelRule(op="fake_quantize", impl=f"{__name__}:counting", device="*", formats=("*",))
    spec = QuantizerSpec(formats("int8"), PerChannel(0))
    quantizer = TensorQuantizer(spec, tensor="weight", kernels=KernelTable([(rule, "me", False)]))
    quantizer.calibrate_on(weight)
    CALLS.clear()
    return quantizer


def test_a_frozen_weight_is_quantized_once(formats: Any, x: Tensor) -> None:
    weight = nn.Parameter(x.clone(), requires_grad=False)
    quantizer = counted(formats, weight)
    first = quantizer(weight)
    assert quantizer(weight) is first
    assert len(CALLS) == 1


@pytest.mark.parametrize("change", ["write", "data", "range", "move", "another"])
def test_a_frozen_weight_that_changes_is_quantized_anew(
    change: str, formats: Any, x: Tensor
) -> None:
    weight = nn.Parameter(x.clone(), requires_grad=False)
    quantizer = counted(formats, weight)
    quantizer(weight)
    if change == "write":
        weight.mul_(0.5)
    elif change == "data":
        weight.data = weight.data * 0.5
    elif change == "range":
        quantizer.set_amax(amax(x, PerChannel(0)) * 2)
    elif change == "move":
        quantizer.double()
    else:
        weight = nn.Parameter(x * 0.5, requires_grad=False)
    expected = fake_quantize(weight, quantizer.spec, quantizer.scales)
    assert torch.equal(quantizer(weight), expected)
    assert len(CALLS) == 2


def test_a_weight_that_is_trained_is_quantized_on_every_pass(formats: Any, x: Tensor) -> None:
    weight = nn.Parameter(x.clone())
    quantizer = counted(formats, weight)
    with torch.no_grad():
        quantizer(weight)
        quantizer(weight)
    assert len(CALLS) == 2


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_copy_made_in_evaluation_serves_training(formats: Any, x: Tensor, guard: Any) -> None:
    weight = nn.Parameter(x.clone(), requires_grad=False)
    quantizer = TensorQuantizer(QuantizerSpec(formats("int8"), PerChannel(0)), tensor="weight")
    with guard():
        quantizer.calibrate_on(weight)
        expected = quantizer(weight).clone()
    adapter = nn.Parameter(torch.ones(64))
    (adapter * quantizer(weight)).sum().backward()
    assert adapter.grad is not None
    assert torch.equal(adapter.grad, expected.sum(0))


def test_a_copy_follows_the_rest_of_its_chain(formats: Any, x: Tensor) -> None:
    weight = nn.Parameter(x.clone(), requires_grad=False)
    second = QuantizerSpec(formats("fp8"), PerTensor())
    spec = QuantizerSpec(formats("int4"), PerGroup(32), then=second)
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(weight)
    assert quantizer.then is not None
    first = fake_quantize(weight, dataclasses.replace(spec, then=None), quantizer.scales)
    assert not torch.equal(quantizer(weight), first)

    quantizer.then.enabled = False
    assert torch.equal(quantizer(weight), first)
    quantizer.then.enabled = True
    quantizer.then.set_amax(torch.tensor(0.01))
    assert quantizer(weight).abs().max() <= 0.0101


def test_a_weight_written_through_its_data_is_seen_after_eval(formats: Any) -> None:
    """What merges adapters writes so, and no version counter tells."""
    spec = QuantizerSpec(formats("int8"), PerTensor())
    quantizer = TensorQuantizer(spec, tensor="weight").eval()
    weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    quantizer.set_amax(torch.tensor(2.0))
    before = quantizer(weight)
    weight.data.mul_(2)
    quantizer.eval()
    assert torch.equal(quantizer(weight), fake_quantize(weight, spec, quantizer.scales))
    assert not torch.equal(quantizer(weight), before)


def test_the_cache_is_neither_copied_nor_saved(formats: Any, x: Tensor) -> None:
    weight = nn.Parameter(x.clone(), requires_grad=False)
    spec = QuantizerSpec(formats("int8"), PerChannel(0))
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(weight)
    small = len(pickle.dumps(quantizer))
    expected = quantizer(weight)
    assert len(pickle.dumps(quantizer)) < small + 64  # without the copy of 6 x 64 numbers
    assert torch.equal(copy.deepcopy(quantizer)(weight), expected)
    assert quantizer.state_dict() == {}


# --- learned ranges -------------------------------------------------------------------------------


def test_a_learned_range_has_the_gradient_of_lsq(formats: Any) -> None:
    spec = QuantizerSpec(formats("int4"), PerTensor())
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.set_amax(torch.tensor(1.4))
    learned = quantizer.learn()
    x = torch.tensor([0.33, -0.5, 5.0, -5.0], requires_grad=True)
    found = quantizer(x)
    assert torch.equal(found, fake_quantize(x, spec, scales_for(Range(torch.tensor(1.4)), spec)))
    found.sum().backward()

    step = 1.4 / 7  # equations 3 and 5 of the paper, for each element
    inside = sum(round(v / step) - v / step for v in (0.33, -0.5))
    assert learned.grad is not None
    of_step = (inside + 7 - 8) / (4 * 7) ** 0.5  # the gradient of the step, scaled by section 2.2
    assert float(learned.grad) == pytest.approx(7 * of_step, abs=1e-5)  # moves the step by lr * it
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_learned_range_of_a_frozen_weight_is_followed(formats: Any, x: Tensor) -> None:
    weight = nn.Parameter(x.clone(), requires_grad=False)
    spec = QuantizerSpec(formats("int4"), PerTensor())
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(weight)
    learned = quantizer.learn()
    for _ in range(2):  # two steps of training
        quantizer(weight).sum().backward()
        with torch.no_grad():
            learned.mul_(0.5)
            expected = fake_quantize(weight, spec, scales_for(Range(learned[0]), spec))
            assert torch.equal(quantizer(weight), expected)


def test_training_a_range_lowers_the_error(formats: Any) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    quantizer = TensorQuantizer(QuantizerSpec(formats("int4"), PerTensor()), tensor="weight")
    quantizer.calibrate_on(x)
    before = float((quantizer(x) - x).square().mean())
    optimizer = torch.optim.Adam([quantizer.learn()], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    after = float((quantizer(x) - x).square().mean().detach())
    assert after < 0.8 * before


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_a_learned_range_is_kept_and_exported_as_it_is_used(
    granularity: Any, formats: Any, x: Tensor
) -> None:
    spec = QuantizerSpec(formats("int4"), granularity)
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(x)
    calibrated = quantizer(x)
    with torch.no_grad():
        quantizer.learn().mul_(0.5)
    expected = quantizer(x).detach()
    assert not torch.equal(expected, calibrated)

    again = TensorQuantizer(spec, tensor="weight")
    again.load_state(quantizer.state())
    assert torch.equal(again(x), expected)
    assert torch.equal(fake_quantize(x, spec, quantizer.scales), expected)


def test_a_learned_range_below_zero_counts_by_its_magnitude(formats: Any, x: Tensor) -> None:
    quantizer = TensorQuantizer(QuantizerSpec(formats("int4"), PerTensor()), tensor="weight")
    quantizer.calibrate_on(x)
    learned = quantizer.learn()
    expected = quantizer(x).detach()
    with torch.no_grad():
        learned.neg_()
    assert torch.equal(quantizer(x), expected)
    assert torch.equal(fake_quantize(x, quantizer.spec, quantizer.scales), expected)


def test_what_cannot_be_learned_says_why(formats: Any, x: Tensor) -> None:
    dynamic = TensorQuantizer(QuantizerSpec(formats("int8"), PerToken(), dynamic=True), name="a")
    with pytest.raises(NumericsError, match="a: only a calibrated static range"):
        dynamic.learn()
    blocks = TensorQuantizer(QuantizerSpec(formats("nvfp4"), PerGroup(16)), tensor="weight")
    blocks.calibrate_on(x)
    with pytest.raises(NumericsError, match="ranges of nvfp4 cannot be learned"):
        blocks.learn()


# --- given ranges, backends -----------------------------------------------------------------------


def test_a_given_range_needs_no_calibration(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("fp8"), PerTensor(), constant_amax=448.0)
    quantizer = TensorQuantizer(spec)
    assert quantizer.calibrated
    assert torch.equal(quantizer(x), x.to(torch.float8_e4m3fn).float())


def doubled(x: Tensor, spec: QuantizerSpec, scales: Any) -> Tensor:
    """A numerics of somebody else."""
    return x * 2


def test_a_backend_serves_who_names_it_and_nobody_else(formats: Any, x: Tensor) -> None:
    rule = KernelRule(
        op="fake_quantize",
        impl=f"{__name__}:doubled",
        device="cpu",
        formats=("*",),
        backend="doubled",
    )
    table = KernelTable([(rule, "test", False)])
    named = QuantizerSpec(formats("int8"), PerToken(), dynamic=True, backend="doubled")
    plain = QuantizerSpec(formats("int8"), PerToken(), dynamic=True)
    assert torch.equal(TensorQuantizer(named, kernels=table)(x), x * 2)
    assert torch.equal(TensorQuantizer(plain, kernels=table)(x), fake_quantize(x, plain))


def test_an_unknown_backend_names_the_quantizer_and_the_known_ones(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("int8"), PerToken(), dynamic=True, backend="dubled")
    with pytest.raises(NumericsError, match=r"up\.input: no backend 'dubled'"):
        TensorQuantizer(spec, name="up.input")(x)


# --- asymmetric and unsigned ----------------------------------------------------------------------


def test_an_asymmetric_one_uses_both_ends(formats: Any, x: Tensor) -> None:
    shifted = x + 3
    quantizer = TensorQuantizer(QuantizerSpec(formats("int8-asym"), PerTensor()), tensor="weight")
    quantizer.calibrate_on(shifted)
    symmetric = fake_quantize(shifted, QuantizerSpec(formats("int8"), PerTensor()))
    assert relative(quantizer(shifted), shifted) < relative(symmetric, shifted) * 0.8
    low, high = float(quantizer.amin or 0), float(quantizer.amax or 0)
    assert low == min(0.0, float(shifted.min()))
    assert high == float(shifted.max())
    with pytest.raises(NumericsError, match="both ends"):
        quantizer.set_amax(torch.tensor(1.0))


def test_gradients_of_an_asymmetric_one_end_at_both_ends(formats: Any) -> None:
    quantizer = TensorQuantizer(QuantizerSpec(formats("int8-asym"), PerTensor()))
    quantizer.set_range(Range(torch.tensor(4.0), amin=torch.tensor(-1.0)))
    x = torch.tensor([-2.0, -0.5, 3.0, 5.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_negative_data_in_an_unsigned_format_is_an_error(formats: Any, x: Tensor) -> None:
    quantizer = TensorQuantizer(QuantizerSpec(formats("uint8"), PerTensor()), name="relu.output")
    with pytest.raises(NumericsError, match=r"relu\.output: uint8 holds no negative numbers"):
        quantizer.set_range(quantizer.extremes.range_of(quantizer.extremes.of(x)))
    quantizer.set_range(quantizer.extremes.range_of(quantizer.extremes.of(x.relu())))
    assert relative(quantizer(x.relu()), x.relu()) < 0.01
    with pytest.raises(NumericsError, match="holds no negative numbers"):
        quantizer(x)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4-asym", "nvfp4", "nvfp4-four-over-six", "mxfp4"])
def test_the_state_brings_back_every_bit(name: str, formats: Any, x: Tensor) -> None:
    number = formats(name)
    granularity = number.weight_granularity
    spec = QuantizerSpec(number, granularity, affine=None, rotation=Rotation(back=True))
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(x)
    fresh = TensorQuantizer(spec, tensor="weight")
    fresh.load_state(quantizer.state())
    assert fresh.calibrated
    assert torch.equal(fresh(x), quantizer(x))


def test_a_quantizer_can_be_pickled_whole(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("int8"), PerChannel(0))
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(x)
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), quantizer(x))


def test_weights_measured_anew_equal_what_calibrate_on_takes(formats: Any, x: Tensor) -> None:
    spec = QuantizerSpec(formats("nvfp4-four-over-six"), PerGroup(16))
    quantizer = TensorQuantizer(spec, tensor="weight")
    quantizer.calibrate_on(x)
    assert torch.equal(quantizer(x), fake_quantize(x, spec, scales_for(measure(x, spec), spec, x)))
    assert torch.equal(quantizer(x), fake_quantize(x, spec))
