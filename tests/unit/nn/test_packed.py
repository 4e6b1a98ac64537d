"""A packed weight behaves like the weight it stands for, and is never silently something else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.builtin.formats import FORMATS
from bittern.errors import CheckpointError, NumericsError
from bittern.nn.packed import PACKED, PackedWeight, empty_packed, flatten_packed, unflatten_packed
from bittern.nn.packed import pack as pack_as
from bittern.numerics import fake_quantize
from bittern.records import PerChannel, PerGroup, QuantizerSpec

SameBits = Callable[[Tensor, Tensor], bool]
BY_NAME = {f.name: f for f in FORMATS}
INT4 = QuantizerSpec(BY_NAME["int4"], PerGroup(16))
NVFP4 = QuantizerSpec(BY_NAME["nvfp4"], PerGroup(16))


@pytest.fixture
def w() -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def packed(w: Tensor, spec: QuantizerSpec = INT4) -> PackedWeight:
    return pack_as(w, spec, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [INT4, NVFP4], ids=str)
def test_it_unpacks_to_what_fake_quantization_gives(
    w: Tensor, spec: QuantizerSpec, dtype: torch.dtype, same_bits: SameBits
) -> None:
    weight = packed(w.to(dtype), spec)
    assert same_bits(weight.dequantize(), fake_quantize(w.to(dtype), spec))
    assert (weight.shape, weight.dtype) == (w.shape, dtype)
    assert weight.stored_bytes < w.numel()


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t @ torch.ones(32),
        lambda t: F.linear(torch.ones(3, 32), t),
        lambda t: t.t(),
        lambda t: t[2:4],
        lambda t: torch.cat([t, t]),
        lambda t: t.double(),
        lambda t: t.to(torch.int32),
        lambda t: torch.stack([t.sum(), t.amax()]),
        lambda t: torch.zeros(8, 32).copy_(t),
    ],
    ids=["matmul", "linear", "t", "slice", "cat", "double", "int", "list", "copy"],
)
def test_functions_that_do_not_know_it_compute_with_what_it_stands_for(
    w: Tensor, function: Callable[[Tensor], Tensor], same_bits: SameBits
) -> None:
    found = function(packed(w))
    expected = function(fake_quantize(w, INT4))
    assert same_bits(found.dequantize() if isinstance(found, PackedWeight) else found, expected)


def test_a_cast_changes_the_dtype_and_no_code(w: Tensor, same_bits: SameBits) -> None:
    weight = packed(w)
    there = weight.half()
    assert isinstance(there, PackedWeight)
    assert there.dtype == torch.float16
    assert same_bits(there.codes, weight.codes)
    assert same_bits(there.float().dequantize(), weight.dequantize())
    assert same_bits(there.dequantize(), weight.dequantize().half())


def test_a_module_moves_and_casts_its_packed_weight(w: Tensor, same_bits: SameBits) -> None:
    layer = nn.Linear(32, 8)
    layer.weight = nn.Parameter(packed(w), requires_grad=False)
    expected, parameter = layer.weight.dequantize(), layer.weight
    layer.to(torch.bfloat16).to(torch.float32)
    assert layer.weight is parameter  # an optimizer and a tied module would still find it
    assert isinstance(layer.weight, nn.Parameter)
    assert same_bits(layer.weight.dequantize(), expected)
    layer.to("meta")
    assert layer.weight.is_meta
    assert isinstance(layer.to_empty(device="cpu").weight, PackedWeight)


def test_what_it_unpacks_to_keeps_its_strides(same_bits: SameBits) -> None:
    w = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    spec = QuantizerSpec(BY_NAME["int8"], PerChannel(0))
    weight = pack_as(w, spec, None, stride=w.stride())
    assert weight.dequantize().is_contiguous(memory_format=torch.channels_last)
    assert same_bits(weight.dequantize(), fake_quantize(w, spec))
    turned = weight.to(memory_format=torch.contiguous_format, copy=True)
    assert turned.dequantize().is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.mul_(2),
        lambda t: t.data.add_(1),
        nn.init.normal_,
        lambda t: torch.add(t, 1, out=t),
        lambda t: torch._foreach_mul_([torch.ones(1), t], 2.0),
    ],
    ids=["mul_", "data", "init", "out", "foreach"],
)
def test_a_change_in_place_is_refused(w: Tensor, change: Callable[[Tensor], object]) -> None:
    weight = nn.Parameter(packed(w), requires_grad=False)
    before = weight.dequantize()
    with pytest.raises(NumericsError, match="cannot be changed in place"):
        change(weight)
    assert torch.equal(weight.dequantize(), before)


def test_copies_and_pickles_are_packed_parameters(w: Tensor, same_bits: SameBits) -> None:
    weight = nn.Parameter(packed(w), requires_grad=False)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for there in (
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.load(file, weights_only=False),
    ):
        assert isinstance(there, PackedWeight)
        assert isinstance(there, nn.Parameter)
        assert there.codes.data_ptr() != weight.codes.data_ptr()
        assert same_bits(there.dequantize(), weight.dequantize())


def test_it_can_be_shared_between_processes(w: Tensor) -> None:
    layer = nn.Linear(32, 8)
    layer.weight = nn.Parameter(packed(w), requires_grad=False)
    layer.share_memory()
    assert all(part.is_shared() for part in layer.weight.parts.values())


# --- state ----------------------------------------------------------------------------------------


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(32, 8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_a_state_dict_fills_a_packed_weight_or_a_plain_one(w: Tensor, same_bits: SameBits) -> None:
    source = layer_of(packed(w))
    for target in (layer_of(empty_packed(w, INT4)), nn.Linear(32, 8)):
        target.load_state_dict(source.state_dict())
        assert same_bits(target.weight.dequantize(), source.weight.dequantize())
    assigned = nn.Linear(32, 8)
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(assigned.weight, PackedWeight)


def test_a_state_dict_that_does_not_fit_is_refused(w: Tensor) -> None:
    target = layer_of(packed(w))
    before = target.weight.dequantize()
    with pytest.raises(RuntimeError, match="a plain tensor has no codes"):
        target.load_state_dict(nn.Linear(32, 8).state_dict())
    with pytest.raises(RuntimeError, match="does not fit one packed as"):
        target.load_state_dict(layer_of(packed(w, NVFP4)).state_dict())
    assert torch.equal(target.weight.dequantize(), before)


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
def test_an_empty_one_has_room_for_what_packing_gives(number_format, same_bits: SameBits) -> None:
    w = torch.rand(6, 80).bfloat16()
    spec = QuantizerSpec(number_format, number_format.weight_granularity)
    weight, there = pack_as(w, spec, None), empty_packed(w, spec)
    with torch.no_grad():
        there.copy_(unflatten_packed("a.w", flatten_packed("a.w", weight), like=there))
    assert same_bits(there.dequantize(), weight.dequantize())
    assert there.dtype == torch.bfloat16


def test_tensors_of_a_file_that_do_not_fit_are_named(w: Tensor) -> None:
    tensors, like = flatten_packed("fc.weight", packed(w)), empty_packed(w, INT4)
    assert set(tensors) == {f"{PACKED}fc.weight/codes", f"{PACKED}fc.weight/scale"}
    with pytest.raises(CheckpointError, match=r"fc\.weight: the scale .* missing"):
        unflatten_packed("fc.weight", {k: v for k, v in tensors.items() if "codes" in k}, like)
    wrong = {**tensors, f"{PACKED}fc.weight/codes": torch.zeros(8, 15, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"codes .* \(8, 15\)"):
        unflatten_packed("fc.weight", wrong, like)


def test_the_numbers_that_it_stands_for_are_taken(w: Tensor) -> None:
    """DistributedDataParallel sends those of one rank to all."""
    layer = layer_of(packed(w))
    codes = layer.weight.codes.clone()
    layer.load_state_dict({**layer.state_dict(), "weight": layer.weight.dequantize()})
    assert torch.equal(layer.weight.codes, codes)


# --- gradients and compilers ----------------------------------------------------------------------


def test_gradients_flow_through_it_to_the_input(w: Tensor) -> None:
    x = torch.randn(3, 32, requires_grad=True)
    F.linear(x, packed(w)).square().sum().backward()
    found, x.grad = x.grad, None
    F.linear(x, fake_quantize(w, INT4)).square().sum().backward()
    assert torch.equal(found, x.grad)


def test_compiled_functions_see_the_tensors_inside(w: Tensor) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.dequantize()) + weight.sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 32)
    for spec in (INT4, NVFP4, QuantizerSpec(BY_NAME["int4"], PerChannel(0))):
        weight = packed(w, spec)
        assert torch.equal(compiled(x, weight), function(x, weight))


def test_caches_of_compiled_code_tell_formats_apart_and_no_numbers(w: Tensor) -> None:
    key = packed(w)._stable_hash_for_caching()
    assert packed(w * 2)._stable_hash_for_caching() == key
    assert packed(w, QuantizerSpec(BY_NAME["nf4"], PerGroup(16)))._stable_hash_for_caching() != key
    assert packed(w).half()._stable_hash_for_caching() != key
