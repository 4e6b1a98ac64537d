"""Pure functions of the number formats: the one rule of design/numerics.md."""

from bittern.numerics.codec import Codec, FloatCodec, IntCodec, Scales, codec_of
from bittern.numerics.layout import amax, scale_shape
from bittern.numerics.quantize import (
    Quantized,
    dequantize,
    fake_quantize,
    quantize,
    scales_from_amax,
)

__all__ = [
    "Codec",
    "FloatCodec",
    "IntCodec",
    "Quantized",
    "Scales",
    "amax",
    "codec_of",
    "dequantize",
    "fake_quantize",
    "quantize",
    "scale_shape",
    "scales_from_amax",
]
