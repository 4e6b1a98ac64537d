"""The straight-through gradient: 1 where |x| <= amax, 0 beyond."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bittern.numerics import Range, amax, fake_quantize, scales_from_amax
from bittern.numerics.autograd import straight_through
from bittern.records import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

MakeSpec = Callable[..., QuantizerSpec]


def run(x: Tensor, ranges: Tensor | None, spec: QuantizerSpec) -> Tensor:
    scales = scales_from_amax(ranges, spec) if ranges is not None else None
    clip = Range(ranges) if ranges is not None else None
    return straight_through(x, clip, spec.granularity, lambda v: fake_quantize(v, spec, scales))


@pytest.mark.parametrize("name", ["int8", "int4n", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_one_inside_and_zero_outside(
    name: str, dtype: torch.dtype, make_spec: MakeSpec
) -> None:
    values = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 2.5]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    upstream = torch.arange(1, 8, dtype=dtype)

    run(x, torch.tensor(2.0), make_spec(name)).backward(upstream)

    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


@pytest.mark.parametrize(
    "granularity",
    [PerChannel(0), PerChannel(-1), PerToken(), PerGroup(3), PerGroup(4), PerBlock(2, 3)],
    ids=str,
)
def test_every_scale_has_its_own_border(granularity: Granularity, make_spec: MakeSpec) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spec = make_spec("int8", granularity)
    ranges = amax(x.detach(), granularity) / 2

    run(x, ranges, spec).sum().backward()

    assert x.grad is not None
    for index in ((i, j) for i in range(5) for j in range(8)):
        match granularity:
            case PerChannel(axis=0) | PerToken():
                border = ranges[index[0], 0]
            case PerChannel():
                border = ranges[0, index[1]]
            case PerGroup(size=size):
                border = ranges[index[0], index[1] // size]
            case PerBlock():
                border = ranges[index[0] // 2, index[1] // 3]
        assert x.grad[index].item() == float(x[index].abs() <= border)
    assert 0 < x.grad.sum() < 40


def test_dynamic_scales_pass_every_gradient(make_spec: MakeSpec) -> None:
    x = torch.tensor([[-3.0, 0.0, 3.0]], requires_grad=True)
    run(x, None, make_spec("int8", PerToken())).backward(torch.tensor([[1.0, 2.0, 3.0]]))

    assert x.grad is not None
    assert x.grad.tolist() == [[1, 2, 3]]


def test_the_border_is_compared_in_float32(make_spec: MakeSpec) -> None:
    value = torch.tensor([0.1], dtype=torch.bfloat16)  # 0.10009765625, above a range of 0.1
    x = value.requires_grad_()
    run(x, torch.tensor(0.1), make_spec("int8")).sum().backward()

    assert x.grad is not None
    assert x.grad.item() == 0


def test_the_value_is_that_of_the_rounding(
    make_spec: MakeSpec, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    x = torch.linspace(-2, 2, 50, requires_grad=True)
    spec = make_spec("int4")
    scales = scales_from_amax(torch.tensor(1.5), spec)

    found = run(x, torch.tensor(1.5), spec)

    assert same_bits(found, fake_quantize(x.detach(), spec, scales))


def test_torch_func_can_differentiate_it(make_spec: MakeSpec) -> None:
    x = torch.tensor([-3.0, 1.0, 2.0])
    found = torch.func.grad(lambda v: run(v, torch.tensor(2.0), make_spec("int8")).sum())(x)

    assert found.tolist() == [0, 1, 1]


def test_an_empty_tensor_has_an_empty_gradient(make_spec: MakeSpec) -> None:
    x = torch.empty(0, 5, requires_grad=True)
    run(x, torch.empty(0, 2), make_spec("int8", PerGroup(3))).sum().backward()

    assert x.grad is not None
    assert x.grad.shape == (0, 5)


def test_a_scalar_has_a_scalar_gradient(make_spec: MakeSpec) -> None:
    x = torch.tensor(0.5, requires_grad=True)
    run(x, torch.tensor(1.0), make_spec("int8", PerTensor())).backward()

    assert x.grad is not None
    assert x.grad.shape == ()
    assert x.grad.item() == 1
