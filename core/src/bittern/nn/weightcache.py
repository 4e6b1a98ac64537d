"""The quantized copy of a frozen weight."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

__all__ = ["WeightCache"]


class WeightCache:
    """Holds what a frozen parameter was quantized to, until it changes.

    A change is seen by the parameter's identity, its version counter and its storage. Writing
    through ``parameter.data`` in place bypasses all three: call `TensorQuantizer.clear_cache` after
    it. A copy or a pickle of the cache is ``None``: it is made again where it is needed.
    """

    __slots__ = ("_pointer", "_source", "_state", "_version", "value")

    def __init__(self, source: Tensor, value: Tensor, state: object = None) -> None:
        self._source = weakref.ref(source)
        self._version = source._version
        self._pointer = source.data_ptr()
        self._state = state
        self.value = value

    def holds(self, x: Tensor, state: object = None) -> bool:
        """Whether ``x`` is the parameter, unchanged, and so is what else the value depends on."""
        same = self._source() is x and self._version == x._version
        return same and self._pointer == x.data_ptr() and self._state == state

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether a tensor is a frozen parameter in memory."""
        return (
            type(x) is nn.Parameter
            and not x.requires_grad
            and x.device.type != "meta"
            and not x.is_inference()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
