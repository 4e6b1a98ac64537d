"""Quantizes subclasses of linear layers and convolutions that have a forward of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bittern.errors import PlanError
from bittern.nn.attention import quantized_output
from bittern.nn.intercept import (
    MATMULS,
    Call,
    Intercept,
    Place,
    active_slots,
    looking,
    path_of,
    variants,
)
from bittern.nn.module import QuantModule, original_class
from bittern.nn.packed import PackedWeight
from bittern.nn.weightreads import why_not_proven

__all__ = ["QuantSubclass", "refusal"]

_INPUT, _WEIGHT = Place(0, ("input",)), Place(1, ("weight",))
_FIRST = Place(0, ("input", "self"))
_TURNS = frozenset(
    {
        *variants("t", "transpose"),
        torch.Tensor.T.__get__,  # type: ignore[attr-defined]
        torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    }
)
_DIRECT = frozenset({F.linear, *variants("conv1d", "conv2d", "conv3d")})


def refusal(module: Any) -> str | bool:
    """Return whether `QuantSubclass` holds for a module, or the sentence that says why not."""
    cls = original_class(module)
    base: Any = next(b for b in cls.__mro__ if b.__module__.startswith("torch.nn.modules."))
    if cls.forward is base.forward:
        return False  # a rule of the base takes it
    why = why_not_proven(module)
    if why is None:
        return True
    return (
        f"{cls.__qualname__} overrides forward of {base.__qualname__}, and its source does not "
        f"show that it only multiplies by its weight: {why} (a rule for "
        f"{cls.__module__}:{cls.__qualname__} would quantize it)"
    )


class QuantSubclass(QuantModule):
    """Mixin for a subclass of a linear layer or convolution; slots ``weight input output``.

    The forward stays the subclass's own. Where it multiplies by ``self.weight``, as
    `bittern.nn.weightreads` has proven that it does and nothing else, the weight and what it
    multiplies are quantized; ``output`` is what the forward returns, or the first item of it.

    Raises:
        PlanError: In the forward pass, when it ends and the weight was never met.
    """

    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the subclass's own forward makes of the quantized operands."""
        if active_slots(self, ("weight", "input")):
            products = _Products(self)
            with looking(products):
                found = super().forward(*args, **kwargs)
            products.finish()
        else:
            found = super().forward(*args, **kwargs)
        return quantized_output(self, found)


class _Products(Intercept):
    """Quantizes both sides of the products with one module's weight."""

    watched = frozenset({*_DIRECT, *MATMULS, *_TURNS})

    def __init__(self, module: QuantSubclass) -> None:
        super().__init__()
        self._module = module
        self._weight = module.weight
        self._turned: Tensor | None = None  # a packed weight has no transposed view
        self._met = False

    def seen(self, call: Call) -> Any:
        """Quantize the operands of a product with the weight."""
        if call.func in _DIRECT:
            if call.get(_WEIGHT) is self._weight:
                return self._run(call, _INPUT, _WEIGHT, self._quantized())
        elif call.func in _TURNS:
            if isinstance(self._weight, PackedWeight) and call.get(_FIRST) is self._weight:
                self._turned = call.put(_FIRST, self._quantized()).run()
                return self._turned
        else:
            left, right = MATMULS[call.func]
            if self._turned is not None and call.get(right) is self._turned:
                return self._run(call, left, right, self._turned)
            if _is_transpose(call.get(right), self._weight):
                return self._run(call, left, right, self._quantized().t())
        return call.run()

    def finish(self) -> None:
        """Raise if the forward pass used no weight."""
        if not self._met:
            raise PlanError(
                "its forward ended without a product with its weight, so nothing was quantized",
                where=path_of(self._module),
                hint="leave the module out of the recipe, or write a rule and a QuantModule for "
                f"{original_class(self._module).__qualname__}",
            )

    def _quantized(self) -> Tensor:
        self._met = True
        return self._module.quantize("weight", self._weight)

    def _run(self, call: Call, place: Place, weight_place: Place, weight: Tensor) -> Any:
        x = self._module.quantize("input", call.get(place))
        return call.put(place, x).put(weight_place, weight).run()


def _is_transpose(x: object, weight: Tensor) -> bool:
    """Whether ``x`` is the transposed view of a matrix."""
    if not isinstance(x, Tensor) or weight.dim() != 2 or x._base is None:
        return False
    whole = x._base is weight
    if x._base is weight._base:  # the weight is itself a part of a larger tensor
        whole = x.storage_offset() == weight.storage_offset()
    return whole and x.shape == weight.shape[::-1] and x.stride() == weight.stride()[::-1]
