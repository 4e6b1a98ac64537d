"""Pure functions of the number formats: the one rule of design/numerics.md."""

from bittern.numerics.codebook import CodebookCodec
from bittern.numerics.codec import Codec, Scales, codec_of
from bittern.numerics.floats import FloatCodec
from bittern.numerics.grids import FloatGrid
from bittern.numerics.integers import IntCodec
from bittern.numerics.layout import amax, scale_shape
from bittern.numerics.mx import MXFloatCodec, MXIntCodec
from bittern.numerics.nvfp4 import NVFP4Codec
from bittern.numerics.quantize import Quantized, dequantize, fake_quantize, quantize
from bittern.numerics.ranges import Range, measure, scales_for, scales_from_amax

__all__ = [
    "CodebookCodec",
    "Codec",
    "FloatCodec",
    "FloatGrid",
    "IntCodec",
    "MXFloatCodec",
    "MXIntCodec",
    "NVFP4Codec",
    "Quantized",
    "Range",
    "Scales",
    "amax",
    "codec_of",
    "dequantize",
    "fake_quantize",
    "measure",
    "quantize",
    "scale_shape",
    "scales_for",
    "scales_from_amax",
]
