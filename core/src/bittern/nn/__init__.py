"""TensorQuantizer and the quantized modules."""

from bittern.nn.experts import Experts
from bittern.nn.functional import MatMul, ScaledDotProductAttention
from bittern.nn.module import (
    QuantModule,
    named_quant_modules,
    named_quantizers,
    original_class,
    quantizer_keys,
    quantizers_of,
    quantizers_off,
    restore_class,
    switched_off,
)
from bittern.nn.quantizer import TensorQuantizer

__all__ = [
    "Experts",
    "MatMul",
    "QuantModule",
    "ScaledDotProductAttention",
    "TensorQuantizer",
    "named_quant_modules",
    "named_quantizers",
    "original_class",
    "quantizer_keys",
    "quantizers_of",
    "quantizers_off",
    "restore_class",
    "switched_off",
]
