"""Chooses an implementation per (op, format, device, dtype); the reference is last in line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bittern.errors import NumericsError
from bittern.records import KernelRule
from bittern.registry.modules import ANY
from bittern.registry.targets import resolve

__all__ = ["KernelTable"]


class KernelTable:
    """Kernel rules, resolved on first use and cached per key.

    Instances are shared by all quantizers of a model, also by its deep copies.

    Args:
        items: ``(rule, plugin label, is builtin)`` in any order.
    """

    def __init__(self, items: Iterable[tuple[KernelRule, str, bool]] = ()) -> None:
        self._items = sorted(items, key=lambda i: (-i[0].priority, i[2], i[1], i[0].impl))
        self._cache: dict[tuple[str, str, Any, Any, str | None], Callable[..., Any] | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelTable:
        return self

    def find(
        self, op: str, format_name: str, device: Any, dtype: Any, *, backend: str | None = None
    ) -> Callable[..., Any] | None:
        """Return the fast implementation, or ``None`` for the reference.

        Args:
            op: The operation, for example ``"fake_quantize"``.
            format_name: Name of the number format.
            device: A ``torch.device``.
            dtype: A ``torch.dtype``.
            backend: The name that a quantizer asks for; rules with a name serve nobody else.

        Raises:
            NumericsError: No backend of that name does this.
        """
        key = (op, format_name, device, dtype, backend)
        if key not in self._cache:
            self._cache[key] = self._search(*key)
        return self._cache[key]

    def backends(self) -> tuple[str, ...]:
        """Return the names of the backends there are."""
        return tuple(sorted({rule.backend for rule, _, _ in self._items if rule.backend}))

    def _search(
        self, op: str, format_name: str, device: Any, dtype: Any, backend: str | None
    ) -> Callable[..., Any] | None:
        wanted = str(dtype).removeprefix("torch.")
        for rule, plugin, _ in self._items:
            if (
                rule.op == op
                and rule.backend == backend
                and rule.device in (device.type, ANY)
                and (format_name in rule.formats or ANY in rule.formats)
                and wanted in rule.dtypes
                and (rule.capability is None or _capability(device) >= rule.capability)
            ):
                found: Callable[..., Any] = resolve(rule.impl, plugin=plugin)
                return found
        if backend is None:
            return None
        known = ", ".join(self.backends()) or "none is registered"
        raise NumericsError(
            f"no backend {backend!r} does {op} in {format_name} for {wanted} on {device.type}",
            hint=f"backends: {known}; register_kernels of a plugin adds one",
        )


def _capability(device: Any) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
