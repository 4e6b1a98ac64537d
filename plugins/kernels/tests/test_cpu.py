"""The CPU kernel computes what core's reference computes, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bittern
from bittern.numerics import Scales, amax, scales_from_amax
from bittern.numerics import fake_quantize as reference
from bittern.records import (
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)
from bittern_kernels import cpu

TABLE = bittern.Toolkit(block=["*"]).registry.formats
FORMATS = ("int8", "int4", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULARITIES = (PerTensor(), PerChannel(0), PerToken(), PerGroup(16))
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch):
    """Small tensors take the kernel too, in several chunks."""
    sizes = dict.fromkeys(cpu.SMALLEST, 1)
    monkeypatch.setattr(cpu, "SMALLEST", sizes)
    monkeypatch.setattr(cpu, "SMALLEST_FLOAT32", sizes)
    monkeypatch.setattr(cpu, "SMALLEST_OF_ALL", 1)
    monkeypatch.setattr(cpu, "CHUNK", 256)


def spec_of(name: str, granularity: Granularity) -> QuantizerSpec:
    return QuantizerSpec(TABLE.get(name), granularity)


def static(x: Tensor, spec: QuantizerSpec, shrink: float = 1.0) -> Scales:
    return scales_from_amax(amax(x.nan_to_num(1.0, 1.0, 1.0), spec.granularity) * shrink, spec)


def assert_same(x: Tensor, spec: QuantizerSpec, scales: Scales | None) -> None:
    """Assert equal bits, and NaN where the reference has one (its payload depends on the place)."""
    before = x.clone()
    found, wanted = cpu.fake_quantize(x, spec, scales), reference(x, spec, scales)
    assert found is not None
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    nan = wanted.isnan()
    assert torch.equal(found.isnan(), nan)
    bits = BITS[x.dtype]
    assert torch.equal(found.view(bits)[~nan], wanted.view(bits)[~nan])
    assert torch.equal(x.view(bits), before.view(bits))


@pytest.mark.parametrize("shrink", [1.0, 0.25, 3.0], ids=["amax", "clipping", "wide"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_static_scales(name, dtype, granularity, shrink):
    torch.manual_seed(0)
    x = torch.randn(67, 48).to(dtype)
    spec = spec_of(name, granularity)
    assert_same(x, spec, static(x, spec, shrink))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_scales_from_the_tensor_itself(name, dtype, granularity):
    torch.manual_seed(1)
    x = torch.randn(5, 67, 48).to(dtype)
    x[2] = 0
    x[3, 7] = 0
    assert_same(x, spec_of(name, granularity), None)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_values(name, granularity, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(
        st.tuples(st.integers(1, 9), st.integers(1, 4).map(lambda n: 16 * n))
        if isinstance(granularity, PerGroup)
        else st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)
    )
    seed = data.draw(st.integers(0, 2**31))
    values = st.floats(width=32, allow_nan=True, allow_infinity=True)
    special = data.draw(st.lists(values, max_size=6))
    torch.manual_seed(seed)
    exponents = torch.randint(-30, 20, shape)
    x = (torch.randn(shape) * torch.exp2(exponents.float())).flatten()
    for value, place in zip(special, torch.randperm(x.numel()).tolist(), strict=False):
        x[place] = value
    x = x.reshape(shape).to(dtype)
    spec = spec_of(name, granularity)
    assert_same(x, spec, None)
    assert_same(x, spec, static(x, spec, data.draw(st.sampled_from([1.0, 0.3, 1e-30]))))


@pytest.mark.parametrize("scale", [1.0, 0.037, 2.0**-9, 3.1e20, 2.0**-140])
@pytest.mark.parametrize("name", FORMATS)
def test_all_bfloat16_values(name, scale):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert_same(x, spec_of(name, PerTensor()), Scales(torch.tensor(scale)))


@pytest.mark.parametrize("dtype_name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_value_midpoint_and_neighbour(dtype_name):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    grid = codes.view(getattr(torch, dtype_name)).float()
    grid = grid[grid.isfinite()].unique()
    middle = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, middle, grid * 1.5])
    inf = torch.full_like(points, float("inf"))
    near = [points, torch.nextafter(points, inf), torch.nextafter(points, -inf)]
    x = torch.cat([*near, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])])
    codec = "bittern.numerics.floats:FloatCodec"
    params = {"dtype": dtype_name}
    number_format = NumberFormat(name="f", bits=8, kind="float", codec=codec, params=params)
    spec = QuantizerSpec(number_format, PerTensor())
    for scale in (1.0, 2.0**-20, 0.3):
        assert_same(x * scale, spec, Scales(torch.tensor(scale)))


def test_a_million_random_float32_bit_patterns_to_fp8(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 2**18)
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator)
    x = bits.to(torch.int32).view(torch.float32)
    assert_same(x, spec_of("fp8", PerTensor()), Scales(torch.tensor(1.0)))
    shrunk = torch.randn(2**20, generator=generator) * 2.0**-6  # around the subnormals
    assert_same(shrunk, spec_of("fp8", PerTensor()), Scales(torch.tensor(1.0)))


@pytest.mark.parametrize("name", FORMATS)
def test_integer_ties_and_negative_zero(name):
    x = torch.cat([torch.arange(-300, 300) / 2, torch.tensor([-0.0, 0.0, -0.25, 1e-40, -1e-40])])
    for granularity in (PerTensor(), PerToken()):
        spec = spec_of(name, granularity)
        scales = Scales(torch.ones(() if granularity == PerTensor() else (1,)))
        assert_same(x, spec, scales)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_memory_layouts(name, granularity):
    torch.manual_seed(4)
    spec = spec_of(name, granularity)
    base = torch.randn(8, 12, 6, 32)
    for x in (
        base.transpose(0, 1),
        base[:, ::2],
        base[..., :16],
        base.to(memory_format=torch.channels_last),
        base[0, 0, :1].expand(40, 32),
        base.flatten()[3:-13].view(-1, 16),
    ):
        assert_same(x, spec, None)
        assert_same(x, spec, static(x, spec))


def test_channels_last_stays_channels_last():
    x = torch.randn(4, 8, 5, 7).to(memory_format=torch.channels_last)
    found = cpu.fake_quantize(x, spec_of("int8", PerTensor()), None)
    assert found is not None
    assert found.stride() == x.stride()


@pytest.mark.parametrize("shape", [(64, 8, 3, 3), (512, 1), (1, 512), (512,)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_per_channel(name, shape):
    x = torch.randn(shape).bfloat16()
    for axis in (0, -len(shape)):
        spec = spec_of(name, PerChannel(axis))
        assert_same(x, spec, static(x, spec))


def test_declined():
    torch.manual_seed(5)
    x = torch.randn(32, 40)
    spec = spec_of("int8", PerTensor())
    nvfp4 = NumberFormat(name="x", bits=4, codec="collections:Counter")
    declined = {
        "empty": (torch.empty(0, 4), spec, None),
        "another axis": (x, spec_of("int8", PerChannel(1)), None),
        "partial groups": (x, spec_of("int4", PerGroup(16)), None),
        "blocks": (x, spec_of("int8", PerBlock(8, 8)), None),
        "scales of a wrong shape": (x, spec, Scales(torch.ones(32, 1))),
        "an axis it does not have": (x, spec_of("int8", PerChannel(2)), Scales(torch.ones(2))),
        "a learned scale": (x, spec, Scales(torch.ones((), requires_grad=True))),
        "an input with a gradient": (x.clone().requires_grad_(), spec, None),
        "a format of another codec": (x, QuantizerSpec(nvfp4, PerTensor()), None),
    }
    for why, arguments in declined.items():
        assert cpu.fake_quantize(*arguments) is None, why
    with torch.no_grad():
        assert cpu.fake_quantize(x.clone().requires_grad_(), spec, None) is not None


def test_small_tensors_are_left_to_the_reference(monkeypatch):
    monkeypatch.undo()
    for name, dtype in itertools.product(FORMATS, DTYPES):
        assert (
            cpu.fake_quantize(torch.ones(64, 64).to(dtype), spec_of(name, PerToken()), None) is None
        )
    assert cpu.fake_quantize(torch.ones(256, 64), spec_of("fp8", PerToken()), None) is not None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_takes_the_reference():
    x = torch.randn(3, 32, 16)
    spec = spec_of("int8", PerTensor())
    scales = Scales(torch.tensor(0.02))

    def kernel_or_reference(row: Tensor) -> Tensor:
        found = cpu.fake_quantize(row, spec, scales)
        return reference(row, spec, scales) if found is None else found

    assert torch.equal(torch.vmap(kernel_or_reference)(x), reference(x, spec, scales))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_quantized_model_gives_the_same_with_and_without_the_plugin(context):
    torch.manual_seed(6)
    data = [torch.randn(8, 64) for _ in range(2)]
    outputs = []
    for toolkit in (bittern.Toolkit(plugins=["kernels"]), bittern.Toolkit(block=["*"])):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
        toolkit.quantize(model, "fp8", data)
        with context():
            outputs.append(model(data[0]))
    assert torch.equal(*outputs)


def test_gradients_pass_straight_through_the_kernel():
    torch.manual_seed(8)
    grads = []
    for toolkit in (bittern.Toolkit(plugins=["kernels"]), bittern.Toolkit(block=["*"])):
        torch.manual_seed(9)
        model = nn.Sequential(nn.Linear(64, 32))
        x = torch.randn(8, 64)
        toolkit.quantize(model, "int8", [x])
        model(x).square().sum().backward()
        grads.append(model[0].weight.grad)
    assert torch.equal(*grads)
