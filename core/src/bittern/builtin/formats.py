"""The number formats of core, as data."""

from __future__ import annotations

from bittern.records import Granularity, NumberFormat, PerChannel, PerGroup, PerTensor

__all__ = ["FORMATS"]

INT = "bittern.numerics.integers:IntCodec"
FLOAT = "bittern.numerics.floats:FloatCodec"
MX_FLOAT = "bittern.numerics.mx:MXFloatCodec"
MX_INT = "bittern.numerics.mx:MXIntCodec"
NVFP4 = "bittern.numerics.nvfp4:NVFP4Codec"
CODEBOOK = "bittern.numerics.codebook:CodebookCodec"


def _integer(bits: int, *, suffix: str = "", **params: bool) -> NumberFormat:
    narrowest = bits <= 4
    weights: Granularity = PerGroup(128) if narrowest else PerChannel(0)
    where = "in groups of 128" if narrowest else "weights per channel, activations per tensor"
    kind = "unsigned " if params.get("unsigned") else ""
    zero = ", with a zero point" if params.get("asymmetric") else ""
    return NumberFormat(
        name=("uint" if kind else "int") + f"{bits}{suffix}",
        bits=bits,
        codec=INT,
        params={"bits": bits, **params},
        zero_point_bits=bits if zero else 0,
        weight_granularity=weights,
        description=f"{kind}{bits}-bit integers{zero}; {where}",
    )


def _float8(name: str, dtype: str, words: str) -> NumberFormat:
    return NumberFormat(
        name=name,
        bits=8,
        kind="float",
        codec=FLOAT,
        params={"dtype": dtype},
        weight_granularity=PerTensor(),
        description=f"8-bit floats, {words}, per tensor",
    )


def _mx(name: str, element: str, bits: int, largest: str) -> NumberFormat:
    return NumberFormat(
        name=name,
        bits=bits,
        kind="float",
        codec=MX_FLOAT,
        params={"element": element},
        scale_bits=8,
        block_only=True,
        weight_granularity=PerGroup(32),
        input_granularity=PerGroup(32),
        description=f"{bits}-bit floats, {element} (largest value {largest}), in blocks of 32 under"
        " a power of two",
    )


def _nvfp4(name: str, words: str, **params: bool) -> NumberFormat:
    return NumberFormat(
        name=name,
        bits=4,
        kind="float",
        codec=NVFP4,
        params=params,
        scale_bits=8,
        tensor_bits=32,
        block_only=True,
        weight_granularity=PerGroup(16),
        input_granularity=PerGroup(16),
        description=f"4-bit floats, e2m1, in blocks of 16 under an e4m3 scale{words}",
    )


FORMATS = (
    *(_integer(bits) for bits in range(2, 9)),
    *(_integer(bits, suffix="-asym", asymmetric=True) for bits in (2, 3, 4, 8)),
    *(_integer(bits, unsigned=True) for bits in (4, 8)),
    _float8("fp8", "float8_e4m3fn", "e4m3 (largest value 448)"),
    _float8("fp8-e5m2", "float8_e5m2", "e5m2 (largest value 57344)"),
    _nvfp4("nvfp4", " and one float32 scale"),
    _nvfp4(
        "nvfp4-four-over-six", ", fitted to 6 or to 4, and one float32 scale", four_over_six=True
    ),
    _mx("mxfp8", "e4m3", 8, "448"),
    _mx("mxfp8-e5m2", "e5m2", 8, "57344"),
    _mx("mxfp6", "e3m2", 6, "28"),
    _mx("mxfp6-e2m3", "e2m3", 6, "7.5"),
    _mx("mxfp4", "e2m1", 4, "6"),
    NumberFormat(
        name="mxint8",
        bits=8,
        codec=MX_INT,
        scale_bits=8,
        block_only=True,
        weight_granularity=PerGroup(32),
        input_granularity=PerGroup(32),
        description="8-bit integers in blocks of 32 under a power of two",
    ),
    NumberFormat(
        name="nf4",
        bits=4,
        kind="codebook",
        codec=CODEBOOK,
        block_only=True,
        weight_granularity=PerGroup(64),
        input_granularity=PerGroup(64),
        description="16 quantiles of the normal distribution (QLoRA), in groups of 64",
    ),
)
