"""Operations that work on every element: one tensor keeps its shape, several are brought together.

Shapes meet from the right. Where two widths meet they are tied; where a width meets something
that is neither a width nor known to be 1, it must stay as it is.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from bittern.tracing.symbolic.dependencies import Step
from bittern.tracing.symbolic.names import TableProcessor, module_types, operations
from bittern.tracing.symbolic.values import Axis, Dim, Shape, Token, axes_of, values_of

__all__ = ["SHAPE_PRESERVING_MODULES", "SHAPE_PRESERVING_OPS", "broadcast", "elementwise"]

_UNARY = """
abs absolute neg negative positive pos exp expm1 exp2 log log1p log2 log10 sqrt rsqrt square
reciprocal sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc erfinv sigmoid
expit logit sign sgn floor ceil round trunc frac clamp clip clamp_min clamp_max relu relu6 elu selu
celu gelu silu mish leaky_relu rrelu hardtanh hardswish hardsigmoid hardshrink softshrink
tanhshrink softplus softsign threshold logsigmoid dropout alpha_dropout feature_alpha_dropout
dropout1d dropout2d dropout3d contiguous clone detach to type type_as float double half bfloat16
int long bool cpu cuda requires_grad isnan isinf isfinite nan_to_num bitwise_not logical_not invert
zeros_like ones_like empty_like full_like rand_like randn_like fill zero softmax log_softmax
softmin normalize deg2rad rad2deg lgamma digamma i0 sinc xlogy_scalar
"""
_NARY = """
add sub subtract mul multiply div divide true_divide truediv floor_divide floordiv remainder fmod
mod pow float_power maximum minimum fmax fmin where eq ne lt le gt ge equal not_equal less greater
less_equal greater_equal logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor and
or xor iadd isub imul itruediv ifloordiv ipow imod addcmul addcdiv lerp atan2 hypot rsub
masked_fill copysign xlogy
"""
_MODULES = """
ReLU ReLU6 ELU SELU CELU GELU SiLU Mish LeakyReLU RReLU Hardtanh Hardswish Hardsigmoid Hardshrink
Softshrink Tanhshrink Softplus Softsign Threshold LogSigmoid Sigmoid Tanh Softmax Softmax2d
LogSoftmax Softmin Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Identity
"""
SHAPE_PRESERVING_OPS = operations(_UNARY.split())
SHAPE_PRESERVING_MODULES = module_types(_MODULES.split())
_COMBINING_OPS = operations(_NARY.split()) | {operator.and_, operator.or_}


def _pass_on(step: Step) -> Any:
    """Hand on the shape; further tensors (a lower bound) meet it element by element."""
    first = step.first
    if isinstance(first, Shape) and not any(True for _ in values_of([step.args[1:], step.kwargs])):
        return first
    return _combine(step)


def _combine(step: Step) -> Any:
    """Bring shapes together; of sizes and numbers, compute a number."""
    values = [*values_of(step.args), *values_of(step.kwargs)]
    shapes = [value for value in values if isinstance(value, Shape)]
    numbers = [value for value in values if not isinstance(value, Shape)]
    if axes_of(numbers):
        return step.boundary("computes with the width")
    if not shapes:
        return None
    return broadcast(step, shapes)


def broadcast(step: Step, shapes: list[Shape]) -> Shape:
    """Return the shape of tensors that meet element by element, and tie their widths."""
    loose = [shape for shape in shapes if shape.loose]
    if loose:
        return step.boundary("brings a width to an unknown place")
    if len(shapes) == 1:
        return shapes[0]
    ranks = [shape.rank for shape in shapes]
    rank = None if None in ranks else max(r for r in ranks if r is not None)
    # Positions that mean the same in all shapes: from the right where the ranks allow it.
    if all(r is None for r in ranks) or rank is not None:
        aligned = [_aligned(shape, rank) for shape in shapes]
    else:
        aligned = [_from_the_right(shape) for shape in shapes]
    positions = sorted({position for dims in aligned for position in dims})
    dims: dict[int, Dim] = {}
    for position in positions:
        meeting: list[Dim] = []
        for shape, own in zip(shapes, aligned, strict=True):
            if position in own:
                meeting.append(own[position])
            elif shape.rank is None or (rank is None and position >= 0):
                meeting.append(Token(shape.source, position))
            # else: the shape has fewer dimensions and is repeated along this one
        dims[position] = _meet(step, meeting, position)
    return Shape(step.node.name, rank, dims, f"what {step.where} returns")


def _aligned(shape: Shape, rank: int | None) -> dict[int, Dim]:
    if rank is None or shape.rank is None:
        return dict(shape.dims)
    offset = rank - shape.rank
    return {position + offset: shape.at(position) for position in range(shape.rank)}


def _from_the_right(shape: Shape) -> dict[int, Dim]:
    if shape.rank is None:
        return dict(shape.dims)
    return {position - shape.rank: shape.at(position) for position in range(shape.rank)}


def _meet(step: Step, dims: list[Dim], position: int) -> Dim:
    """Return the dimension that several become."""
    axes = [dim for dim in dims if isinstance(dim, Axis)]
    others = [dim for dim in dims if not isinstance(dim, Axis) and dim != 1]
    if not axes:
        tokens = set(others)
        return (
            others[0] if len(tokens) == 1 else 1 if not tokens else Token(step.node.name, position)
        )
    narrow = [axis for axis in axes if axis.width == 1]
    if narrow and len(narrow) < len(axes):
        step.walk.linker.block(narrow, f"{step.where} repeats its one channel")
        axes = [axis for axis in axes if axis.width != 1]
    if others:
        step.walk.linker.block(axes, f"{step.where} brings it together with {_stranger(step)}")
        return others[0]
    step.join(axes)
    return axes[0]


def _stranger(step: Step) -> str:
    """Name the tensor whose dimensions are no widths."""
    shapes = (value for value in values_of([step.args, step.kwargs]) if isinstance(value, Shape))
    return next((s.origin for s in shapes if s.origin), "what is no layer's output")


def elementwise() -> TableProcessor:
    """Return the processor for element by element operations."""
    return TableProcessor.of(
        (SHAPE_PRESERVING_OPS | SHAPE_PRESERVING_MODULES, _pass_on),
        (_COMBINING_OPS | {math.sqrt, math.floor, math.ceil}, _combine),
        ties_out=True,
    )
