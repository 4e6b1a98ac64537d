"""Watches which products read the weights of a model, and what they are multiplied with.

Linears, convolutions, experts: whatever a module is called, its weight is an operand of a function
of torch. The quantizers say which tensors are weights at the moment they are handed out, so that
weights that are loaded, gathered or computed for one forward pass are known too.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bittern.nn import TensorQuantizer
from bittern.nn.experts import Experts
from bittern.nn.intercept import MATMULS, Call, Place, variants

__all__ = ["MatrixLayout", "Product", "watch_products"]


@dataclass(frozen=True)
class MatrixLayout:
    """How a weight is a stack of matrices ``(outputs, inputs)``.

    Attributes:
        parts: How many: experts, or groups of a convolution; 1 for a linear.
        inputs: What each multiplies: input features, times the kernel's positions.
        transposed: Whether the weight lies input features first, ``(.., inputs, outputs)``.
    """

    parts: int
    inputs: int
    transposed: bool = False

    def matrices(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as ``(parts, outputs, inputs)``, a view if it can.

        Args:
            weight: The weight, or one number for each of its elements.
        """
        if self.transposed:
            return weight.reshape(self.parts, self.inputs, -1).transpose(1, 2)
        return weight.reshape(self.parts, -1, self.inputs)

    def weight(self, matrices: Tensor, shape: Iterable[int]) -> Tensor:
        """Undo `matrices`.

        Args:
            matrices: Shape ``(parts, outputs, inputs)``.
            shape: The weight's.
        """
        found = matrices.transpose(1, 2) if self.transposed else matrices
        return found.reshape(tuple(shape))


@dataclass(frozen=True)
class Product:
    """One product that read a weight.

    Attributes:
        name: Name of the weight's quantizer.
        layout: How the weight lies.
        operand: What it was multiplied with, as the function got it.
        rows: Makes its rows, ``(parts, tokens, inputs)``, or ``(tokens, inputs)`` of one part.
        part: That part, ``None`` for all of them.
        how: What the rows depend on besides the operand: stride and padding.
        ends: Where the rows of each part end, int32, ``(parts,)``, if ``rows`` are ``(tokens,
            inputs)`` of all of them.
    """

    name: str
    layout: MatrixLayout
    operand: Tensor
    rows: Callable[[], Tensor]
    part: int | None = None
    ends: Tensor | None = None
    how: tuple[object, ...] = ()


@contextmanager
def watch_products(
    weights: Mapping[str, TensorQuantizer], seen: Callable[[Product], None]
) -> Iterator[None]:
    """Call a function for every product that reads one of the weights; they pass unquantized.

    Args:
        weights: Quantizers of weights, by name.
        seen: What to call; the product itself runs afterwards.
    """
    handed: _Table = {}
    try:
        for name, quantizer in weights.items():
            tap = _Tap(name, quantizer.spec.stacked, handed)
            for link in quantizer.chain():  # none of them rounds meanwhile
                link.observer = tap
        with _Products(handed, seen):
            yield
    finally:
        for quantizer in weights.values():
            for link in quantizer.chain():
                link.observer = None


@dataclass(frozen=True)
class _Handed:
    """A weight that a module is about to use."""

    name: str
    stacked: bool
    tensor: Callable[[], Tensor | None]  # storage of a dead one may serve another tensor


_Table = dict[int, dict[str, _Handed]]  # by storage, which several weights may share, and name


class _Tap:
    """Sits in a weight quantizer as its observer, and notes what goes through."""

    def __init__(self, name: str, stacked: bool, handed: _Table) -> None:
        self._name, self._stacked, self._handed = name, stacked, handed

    def observe(self, x: Tensor, experts: Experts | None = None) -> None:
        """Note a weight."""
        here = self._handed.setdefault(x.untyped_storage().data_ptr(), {})
        here.pop(self._name, None)  # the last one is found first: it is used next
        here[self._name] = _Handed(self._name, self._stacked, weakref.ref(x))

    def first_bad_batch(self) -> int | None:
        """Weights are not looked at."""
        return None


_LINEAR = (Place(0, ("input",)), Place(1, ("weight",)))
_GROUPED = variants("grouped_mm", "_grouped_mm")
_CONVS = {f: n for n in (1, 2, 3) for f in variants(f"conv{n}d")}


class _Products(TorchFunctionMode):
    """Recognizes the weights among the operands of functions of torch."""

    def __init__(self, handed: _Table, seen: Callable[[Product], None]) -> None:
        super().__init__()
        self._handed, self._seen = handed, seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Report a product of a weight, and run it."""
        call = Call(func, args, kwargs or {})
        if func is F.linear:
            self._linear(call)
        elif func in MATMULS:
            self._matmul(call, *MATMULS[func])
        elif func in _GROUPED:
            self._grouped(call)
        elif func in _CONVS:
            self._conv(call, _CONVS[func])
        return call.run()

    def _linear(self, call: Call) -> None:
        x, weight = (call.get(place) for place in _LINEAR)
        self._report(x, weight.t() if weight.dim() == 2 else weight)

    def _matmul(self, call: Call, left: Place, right: Place) -> None:
        x, y = call.get(left), call.get(right)
        if y.dim() > 1 and self._find(y) is not None:
            self._report(x, y)
        elif x.dim() > 1 and y.dim() > 1 and self._find(x) is not None:
            self._report(y.transpose(-1, -2), x.transpose(-1, -2), operand=y)

    def _grouped(self, call: Call) -> None:
        x, weight, ends = (call.get(place) for place in (*_LINEAR, Place(2, ("offs",))))
        if x.dim() == 2 and weight.dim() == 3 and ends is not None:
            self._report(x, weight, ends=ends)

    def _report(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        operand: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> None:
        """Report ``x @ weight``, where the weight is one."""
        found = self._find(weight)
        if found is None:
            return
        handed, whole = found
        inputs, stride = weight.shape[-2], weight.stride(-2)
        axes = [a for a in range(int(handed.stacked), whole.dim()) if whole.shape[a] == inputs]
        axes = [a for a in axes if whole.stride(a) == stride] or axes
        if whole.dim() != 2 + handed.stacked or not axes:
            return  # it is multiplied as something else than a matrix
        parts = whole.shape[0] if handed.stacked else 1
        layout = MatrixLayout(parts, inputs, transposed=axes[-1] != whole.dim() - 1)
        part = 0
        if handed.stacked and weight.dim() == 2:
            part = (weight.storage_offset() - whole.storage_offset()) // max(whole.stride(0), 1)
        every = weight.dim() == 3 and (ends is not None or x.dim() == 3)
        if weight.dim() == 3 and not every:
            return
        rows = x if every else x.reshape(-1, inputs)
        self._seen(
            Product(
                handed.name,
                layout,
                x if operand is None else operand,
                lambda: rows,
                part=None if every else part,
                ends=ends,
            )
        )

    def _conv(self, call: Call, dims: int) -> None:
        weight = call.get(Place(1, ("weight",)))
        found = self._find(weight)
        if found is None or weight.shape != found[1].shape:
            return
        x, groups = call.get(Place(0, ("input",))), call.get(Place(6, ("groups",)), 1)
        stride, padding, dilation = (
            call.get(place, default)
            for place, default in (
                (Place(3, ("stride",)), 1),
                (Place(4, ("padding",)), 0),
                (Place(5, ("dilation",)), 1),
            )
        )
        kernel = tuple(weight.shape[2:])
        layout = MatrixLayout(groups, math.prod(weight.shape[1:]))

        def rows() -> Tensor:
            taps = _taps(x, kernel, _each(stride, dims), padding, _each(dilation, dims))
            batch, channels = taps.shape[:2]
            taps = taps.reshape(batch, groups, channels // groups, -1, math.prod(kernel))
            return taps.permute(1, 0, 3, 2, 4).reshape(groups, -1, layout.inputs)

        self._seen(Product(found[0].name, layout, x, rows, how=(stride, padding, dilation)))

    def _find(self, operand: Any) -> tuple[_Handed, Tensor] | None:
        """Return the weight whose memory an operand is, if it is one."""
        if not isinstance(operand, Tensor) or not self._handed:
            return None
        here = self._handed.get(operand.untyped_storage().data_ptr(), {})
        for handed in reversed(here.values()):
            whole = handed.tensor()
            if whole is not None:
                start = operand.storage_offset() - whole.storage_offset()
                if 0 <= start < max(whole.numel(), 1):
                    return handed, whole
        return None


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """Return one number per dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)


def _taps(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: str | int | tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return what each position of a kernel meets, ``(batch, channels, *places, *kernel)``."""
    dims = len(kernel)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(p, p) for p in _each(0 if isinstance(padding, str) else padding, dims)]
    x = F.pad(x, [size for pair in reversed(sides) for size in pair])
    for dim in range(dims):
        x = x.unfold(2 + dim, spans[dim] + 1, stride[dim])[..., :: dilation[dim]]
    return x
