"""Other libraries decode what Bittern makes, and quantize as it does, or a test says why not.

Each test needs the real library. The rules themselves are tested against definitions elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bittern.builtin.formats import FORMATS
from bittern.numerics import (
    Quantized,
    Scales,
    codec_of,
    dequantize,
    fake_quantize,
    quantize,
)
from bittern.numerics.gguf import pack_mxfp4, pack_q4_0, pack_q8_0, unpack_mxfp4, unpack_q8_0
from bittern.numerics.stored import e8m0_bytes, e8m0_scales
from bittern.records import NumberFormat, PerGroup, PerTensor, QuantizerSpec

BY_NAME = {item.name: item for item in FORMATS}


def data(seed: int, *shape: int) -> Tensor:
    """Return normal numbers with ties, zeros and a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, (2 * x).round() / 2, x)
    x = torch.where(torch.rand(shape, generator=generator) < 0.05, 20 * x, x)
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, x)


# --- ONNX -----------------------------------------------------------------------------------------

ONNX_TYPES = {"int8": "INT8", "uint8": "UINT8", "int8-asym": "INT8", "fp8": "FLOAT8E4M3FN"}
ONNX_TYPES |= {"fp8-e5m2": "FLOAT8E5M2", "int4": "INT4", "uint4": "UINT4", "int4-asym": "INT4"}
ONNX_TYPES |= {"nvfp4": "FLOAT4E2M1", "mxfp4": "FLOAT4E2M1", "mxfp8": "FLOAT8E4M3FN"}


def onnx_round_trip(
    x: Tensor, scale: Tensor, zero: Tensor, kind: str, *, block: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of QuantizeLinear and what DequantizeLinear makes of them."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    helper, types = onnx.helper, onnx.TensorProto
    code = getattr(types, kind)
    options: dict[str, Any] = {"axis": x.dim() - 1, "block_size": block} if block else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **options),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], **options),
    ]
    zeros = helper.make_tensor("zero", code, zero.shape, zero.flatten().tolist())
    graph = helper.make_graph(
        nodes,
        "round_trip",
        [
            helper.make_tensor_value_info("x", types.FLOAT, x.shape),
            helper.make_tensor_value_info("scale", types.FLOAT, scale.shape),
        ],
        [
            helper.make_tensor_value_info("codes", code, x.shape),
            helper.make_tensor_value_info("y", types.FLOAT, x.shape),
        ],
        [zeros],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    run = reference.ReferenceEvaluator(model)
    codes, decoded = run.run(None, {"x": x.numpy(), "scale": scale.numpy()})
    return codes, decoded


@pytest.mark.parametrize("name", ONNX_TYPES)
def test_onnx_quantizes_to_the_same_codes_and_decodes_the_same_values(name: str) -> None:
    block = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "int4": 32}.get(name, 0)
    spec = QuantizerSpec(BY_NAME[name], PerGroup(block) if block else PerTensor())
    x = data(0, 8, 64)
    x = x if codec_of(spec.format).signed else x.abs()
    packed = quantize(x, spec)
    zero = packed.scales.zero_point
    zero = zero if zero is not None else torch.zeros_like(packed.scales.scale)
    zero = zero.to(torch.int32) if spec.format.kind == "int" else zero

    codes, decoded = onnx_round_trip(x, packed.scales.step, zero, ONNX_TYPES[name], block=block)

    assert np.array_equal(decoded, dequantize(packed).numpy())
    ours = codec_of(spec.format).load(packed.codes).numpy()
    assert np.array_equal(codes.astype(np.float32), ours)


def test_onnx_derives_the_same_scales_and_zero_points_from_a_tensor() -> None:
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    helper, types = onnx.helper, onnx.TensorProto
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])
    graph = helper.make_graph(
        [node],
        "dynamic",
        [helper.make_tensor_value_info("x", types.FLOAT, [None])],
        [
            helper.make_tensor_value_info("codes", types.UINT8, [None]),
            helper.make_tensor_value_info("scale", types.FLOAT, []),
            helper.make_tensor_value_info("zero", types.UINT8, []),
        ],
    )
    run = reference.ReferenceEvaluator(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    )
    spec = QuantizerSpec(BY_NAME["int8-asym"], PerTensor())
    for seed in range(20):
        x = data(seed, 200) + seed % 5 - 2
        codes, scale, zero = run.run(None, {"x": x.numpy()})
        packed = quantize(x, spec)
        assert packed.scales.zero_point is not None
        assert packed.scales.scale.item() == scale
        # ONNX counts from 0, signed codes from -128: the same integers, moved by 128
        assert packed.scales.zero_point.item() + 128 == zero
        assert np.array_equal(packed.codes.numpy().astype(np.int32) + 128, codes)


# --- GGUF -----------------------------------------------------------------------------------------


def gguf_decode(packed: Tensor, kind: str) -> Tensor:
    gguf = pytest.importorskip("gguf")
    qtype = getattr(gguf.GGMLQuantizationType, kind)
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), qtype))


def gguf_encode(x: Tensor, kind: str) -> Tensor:
    gguf = pytest.importorskip("gguf")
    qtype = getattr(gguf.GGMLQuantizationType, kind)
    return torch.from_numpy(gguf.quants.quantize(x.numpy(), qtype))


def with_half_scales(x: Tensor, spec: QuantizerSpec) -> Quantized:
    """Quantize under scales that were rounded to float16 before, as GGUF needs them."""
    return quantize(x, spec, Scales(quantize(x, spec).scales.scale.half().float()))


def test_gguf_decodes_q8_0_blocks_to_the_same_values() -> None:
    packed = with_half_scales(data(1, 8, 96), QuantizerSpec(BY_NAME["int8"], PerGroup(32)))
    blocks = pack_q8_0(packed.codes, packed.scales.scale)

    assert torch.equal(gguf_decode(blocks, "Q8_0"), dequantize(packed))


def test_gguf_decodes_q4_0_blocks_to_the_same_values() -> None:
    packed = with_half_scales(data(2, 8, 96), QuantizerSpec(BY_NAME["int4"], PerGroup(32)))
    blocks = pack_q4_0(packed.codes, packed.scales.scale)

    assert torch.equal(gguf_decode(blocks, "Q4_0"), dequantize(packed))


def test_gguf_decodes_mxfp4_blocks_to_the_same_values() -> None:
    packed = quantize(data(3, 8, 96), QuantizerSpec(BY_NAME["mxfp4"], PerGroup(32)))
    blocks = pack_mxfp4(packed.codes, e8m0_bytes(packed.scales.scale))

    assert torch.equal(gguf_decode(blocks, "MXFP4"), dequantize(packed))


def test_gguf_rounds_q8_0_codes_under_the_exact_scale_and_stores_it_rounded() -> None:
    """GGUF divides by float32 ``amax / 127`` and then stores it as float16; its own decoder
    multiplies by the rounded one. Bittern rounds the scale first, so that codes fit what is stored.
    """
    x = data(4, 64, 32)
    theirs, scales = unpack_q8_0(gguf_encode(x, "Q8_0"))
    spec = QuantizerSpec(BY_NAME["int8"], PerGroup(32))
    exact, ours = quantize(x, spec), with_half_scales(x, spec)

    assert torch.equal(scales.float(), ours.scales.scale)
    same = (theirs == exact.codes).double().mean()
    assert same > 0.999  # ties: numpy code of GGUF rounds half away from zero
    errors = [
        (dequantize(Quantized(codes, ours.scales, spec, x.dtype)) - x).square().mean()
        for codes in (ours.codes, theirs)
    ]
    assert float(errors[0]) <= float(errors[1])


def test_gguf_takes_the_exponents_of_ocp_for_mxfp4() -> None:
    """The rule "floor": ``floor(log2(amax)) - 2``, with which up to 8 becomes 6."""
    x = data(5, 64, 32)
    _, theirs = unpack_mxfp4(gguf_encode(x, "MXFP4"))
    base = BY_NAME["mxfp4"]
    params = {**base.params, "scale_rounding": "floor"}
    floor = NumberFormat(name="mxfp4", bits=4, codec=base.codec, params=params)
    full = x.any(1)  # of zeros GGUF makes the smallest scale

    found = quantize(x, QuantizerSpec(floor, PerGroup(32))).scales.scale
    assert torch.equal(e8m0_scales(theirs)[full], found[full])
    ceil = quantize(x, QuantizerSpec(base, PerGroup(32))).scales.scale
    assert bool((ceil > found).any())


# --- torchao --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("mxfp4", "f4_unpacked_to_f32"),
        ("mxfp6", "f6_e3m2_unpacked_to_f32"),
        ("mxfp6-e2m3", "f6_e2m3_unpacked_to_f32"),
    ],
)
def test_torchao_decodes_the_same_codes_to_the_same_values(name: str, decoder: str) -> None:
    pytest.importorskip("torchao", reason="torchao is no dependency of the tests")
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    packed = quantize(data(6, 8, 96), QuantizerSpec(BY_NAME[name], PerGroup(32)))

    theirs = getattr(kernels, decoder)(packed.codes)
    assert torch.equal(theirs, codec_of(BY_NAME[name]).load(packed.codes))


# --- ModelOpt's rules, from its source ------------------------------------------------------------


def test_modelopt_packs_ties_of_mxfp4_down_and_simulates_them_to_even() -> None:
    """ModelOpt 0.47's packer compares with ``>`` only: 0.75, 1.75, 3.5 become 0.5, 1.5, 3, and its
    fake quantizer says 1, 2, 4. Bittern rounds to even in both.
    """
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([0.75, 1.75, 3.5, 6.0])
    spec = QuantizerSpec(BY_NAME["mxfp4"], PerGroup(32))

    assert fake_quantize(x, spec)[0, :4].tolist() == [1, 2, 4, 6]
    assert dequantize(quantize(x, spec))[0, :4].tolist() == [1, 2, 4, 6]


def test_modelopt_decodes_zeros_of_fp8_to_nan() -> None:
    """Its packer divides by a scale of 0 (ModelOpt 0.47, ``FP8QTensor``); here the scale is 1."""
    spec = QuantizerSpec(BY_NAME["fp8"], PerTensor())
    packed = quantize(torch.zeros(2, 2), spec)

    assert packed.scales.scale.item() == 1
    assert dequantize(packed).tolist() == [[0, 0], [0, 0]]
