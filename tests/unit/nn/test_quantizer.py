"""TensorQuantizer: when it rounds, when it only looks, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bittern.errors import NumericsError, PluginError
from bittern.nn import TensorQuantizer
from bittern.nn.extremes import Extremes
from bittern.nn.observer import MaxObserver, SharedInputs
from bittern.numerics import fake_quantize
from bittern.records import KernelRule, NumberFormat, PerChannel, PerTensor, PerToken, QuantizerSpec
from bittern.registry import KernelTable

MakeSpec = Callable[..., QuantizerSpec]
SameBits = Callable[[Tensor, Tensor], bool]


def test_it_rounds_by_the_static_range(make_spec: MakeSpec, same_bits: SameBits) -> None:
    spec = make_spec("int8")
    quantizer = TensorQuantizer(spec)
    quantizer.set_amax(torch.tensor(2.0))
    x = torch.randn(5, 6) * 3

    assert same_bits(quantizer(x), fake_quantize(x, spec, quantizer.scales))


def test_a_dynamic_one_takes_every_tensor_as_it_comes(
    make_spec: MakeSpec, same_bits: SameBits
) -> None:
    spec = make_spec("fp8", PerToken(), dynamic=True)
    quantizer = TensorQuantizer(spec)
    quantizer.set_amax(torch.tensor(1.0))  # an algorithm may look; it changes nothing
    x = torch.randn(5, 6) * 100

    assert quantizer.calibrated
    assert quantizer.scales is None
    assert same_bits(quantizer(x), fake_quantize(x, spec))


@pytest.mark.parametrize("state", ["disabled", "uncalibrated", "observing"])
def test_otherwise_the_very_same_tensor_comes_back(state: str, make_spec: MakeSpec) -> None:
    quantizer = TensorQuantizer(make_spec("int8"))
    if state != "uncalibrated":
        quantizer.set_amax(torch.tensor(1.0))
    if state == "observing":
        quantizer.observer = MaxObserver(Extremes(PerTensor()), SharedInputs())
    quantizer.enabled = state != "disabled"
    x = torch.randn(3)

    assert quantizer(x) is x


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_an_impossible_range_is_refused_by_name(value: float, make_spec: MakeSpec) -> None:
    quantizer = TensorQuantizer(make_spec("int8", PerChannel(0)), name="layer.up.weight")

    with pytest.raises(NumericsError, match=r"layer\.up\.weight: amax must be finite"):
        quantizer.set_amax(torch.tensor([[1.0], [value]]))
    assert not quantizer.calibrated


def test_a_range_is_copied(make_spec: MakeSpec) -> None:
    value = torch.tensor(1.0, requires_grad=True)
    quantizer = TensorQuantizer(make_spec("int8"))
    quantizer.set_amax(value)
    with torch.no_grad():
        value.fill_(9.0)

    assert quantizer.amax is not None
    assert quantizer.amax.item() == 1
    assert not quantizer.amax.requires_grad


def test_a_tensor_that_does_not_fit_the_scales_is_refused_by_name(make_spec: MakeSpec) -> None:
    quantizer = TensorQuantizer(make_spec("int8", PerChannel(0)), name="conv.weight")
    quantizer.calibrate_on(torch.randn(4, 3))

    with pytest.raises(NumericsError, match=r"conv\.weight: scales of shape \(4, 1\)"):
        quantizer(torch.randn(5, 3))


def test_calibrating_on_a_tensor_takes_its_largest_magnitudes(make_spec: MakeSpec) -> None:
    quantizer = TensorQuantizer(make_spec("int8", PerChannel(0)))
    quantizer.calibrate_on(torch.tensor([[1.0, -3.0], [0.5, 0.25]], dtype=torch.bfloat16))

    assert quantizer.amax is not None
    assert quantizer.amax.tolist() == [[3.0], [0.5]]
    assert quantizer.amax.dtype == torch.float32


def test_gradients_pass_straight_through_within_the_range(make_spec: MakeSpec) -> None:
    quantizer = TensorQuantizer(make_spec("int8"))
    quantizer.set_amax(torch.tensor(1.0))
    x = torch.tensor([-2.0, 0.3, 1.0, 5.0], requires_grad=True)

    quantizer(x).sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_it_has_no_state_of_its_own(make_spec: MakeSpec) -> None:
    quantizer = TensorQuantizer(make_spec("int8"))
    quantizer.set_amax(torch.tensor(1.0))

    assert not quantizer.state_dict()
    assert not list(quantizer.parameters())


def test_a_format_that_does_not_resolve_fails_when_it_is_made() -> None:
    broken = NumberFormat(name="x", bits=3, codec="bittern.numerics.codec:NoCodec")

    with pytest.raises(PluginError, match="does not resolve"):
        TensorQuantizer(QuantizerSpec(broken, PerTensor()))


def test_it_says_its_format_range_and_state(make_spec: MakeSpec) -> None:
    quantizer = TensorQuantizer(make_spec("int8"))
    assert quantizer.extra_repr() == "int8/tensor, not calibrated"
    quantizer.set_amax(torch.tensor(1.5))
    assert quantizer.extra_repr() == "int8/tensor, amax=1.5"
    quantizer.enabled = False
    assert quantizer.extra_repr() == "int8/tensor, amax=1.5, off"
    quantizer.observer = MaxObserver(Extremes(PerTensor()), SharedInputs())
    assert quantizer.extra_repr() == "int8/tensor, amax=1.5, observing"


# --- kernels --------------------------------------------------------------------------------------


def doubling(x: Tensor, spec: QuantizerSpec, scales: object) -> Tensor:
    """A kernel that is easy to tell from the reference."""
    return x * 2


def declining(x: Tensor, spec: QuantizerSpec, scales: object) -> None:
    """A kernel that takes no tensor."""


def kernel(name: str) -> KernelRule:
    return KernelRule(
        op="fake_quantize", impl=f"{__name__}:{name}", device="cpu", formats=("int8",)
    )


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are found by name, and this file is no installed module."""
    import sys
    from types import ModuleType

    module = ModuleType(__name__)
    module.__dict__.update(doubling=doubling, declining=declining)
    monkeypatch.setitem(sys.modules, __name__, module)


@pytest.mark.usefixtures("importable")
def test_a_kernel_that_fits_does_the_rounding(make_spec: MakeSpec) -> None:
    table = KernelTable([(kernel("doubling"), "fast 1.0", False)])
    x = torch.randn(4)
    for name, by_kernel in (("int8", True), ("int4", False)):
        quantizer = TensorQuantizer(make_spec(name), kernels=table)
        quantizer.set_amax(torch.tensor(1.0))
        assert torch.equal(quantizer(x), x * 2) is by_kernel

    double = TensorQuantizer(make_spec("int8"), kernels=table)
    double.set_amax(torch.tensor(1.0))
    assert not torch.equal(double(x.double()), x.double() * 2)  # not a dtype of the rule


@pytest.mark.usefixtures("importable")
def test_a_kernel_that_declines_leaves_it_to_the_reference(
    make_spec: MakeSpec, same_bits: SameBits
) -> None:
    spec = make_spec("int8")
    quantizer = TensorQuantizer(
        spec, kernels=KernelTable([(kernel("declining"), "fast 1.0", False)])
    )
    quantizer.set_amax(torch.tensor(1.0))
    x = torch.randn(4)

    assert same_bits(quantizer(x), fake_quantize(x, spec, quantizer.scales))
