"""PackedWeight: a parameter that holds the codes and scales of a quantized weight.

It looks like the weight in its own dtype, and any function that is given one computes with what the
codes stand for, so that code which knows nothing about it goes on working. The quantizer of the
slot knows it and unpacks it (`TensorQuantizer.forward`); a kernel that multiplies by packed weights
finds all it needs in `PackedWeight.parts` and ``spec``, before that.

torch.compile sees through it to the tensors inside (``__tensor_flatten__``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bittern.errors import CheckpointError, NumericsError
from bittern.numerics import Quantized, Scales, quantize
from bittern.numerics.compact import PARTS, compact, compact_layout, decode, expand
from bittern.records import QuantizerSpec

__all__ = ["PACKED", "PackedWeight", "empty_packed", "flatten_packed", "pack", "unflatten_packed"]

PACKED = "bittern.packed/"  # then the parameter's name, "/" and the name of the part

aten = torch.ops.aten


class PackedWeight(Tensor):
    """The packed form of a quantized weight, seen as a tensor of the weight's shape and dtype.

    It is read-only but for ``copy_`` from another one of the same format, which is what
    ``load_state_dict`` does, or of the very numbers that it stands for. A cast changes the dtype
    that it is unpacked to, not the codes.

    Args:
        parts: Codes and scales, as `bittern.numerics.compact` makes them.
        spec: Format and granularity.
        shape: Shape of the weight.
        dtype: Dtype it is unpacked to, floating.
        stride: Strides of what it is unpacked to; contiguous by default.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    spec: QuantizerSpec

    @staticmethod
    def __new__(  # noqa: D102 - see the class
        cls,
        parts: Mapping[str, Tensor],
        spec: QuantizerSpec,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        stride: tuple[int, ...] | None = None,
    ) -> PackedWeight:
        found: PackedWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, dtype=dtype, device=parts["codes"].device
        )
        for name in PARTS:
            setattr(found, name, parts.get(name))
        found.spec = spec
        return found

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors inside, by name: ``codes``, ``scale``, ``zero_point``, ``global_scale``."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors inside; ``nbytes`` is what the weight would take unpacked."""
        return sum(part.nbytes for part in self.parts.values())

    def quantized(self) -> Quantized:
        """Return codes, one per element, and float32 scales."""
        return expand(self.parts, tuple(self.shape), self.spec, self.dtype)

    def share_memory_(self) -> PackedWeight:
        """Move the tensors inside into shared memory; torch's own crashes on a wrapper."""
        for part in self.parts.values():
            part.share_memory_()  # type: ignore[no-untyped-call]
        return self

    # --- what torch asks of it ---

    def __tensor_flatten__(self) -> tuple[list[str], tuple[QuantizerSpec, torch.dtype]]:
        return list(self.parts), (self.spec, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any
    ) -> PackedWeight:
        spec, dtype = context
        return cls(inner, spec, shape=size, dtype=dtype, stride=stride)

    def _stable_hash_for_caching(self) -> str:
        """Tell torch's caches of compiled code what else but numbers a compiled function sees."""
        parts = {name: (p.shape, p.stride(), p.dtype, p.device) for name, p in self.parts.items()}
        return repr((self.spec, self.shape, self.stride(), self.dtype, parts))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = _KNOWN.get(func)
        if known is not None:
            return known(*args, **kwargs)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            _check_not_written(func, argument, given)
        for argument in func._schema.arguments:
            _check_not_written(func, argument, kwargs.get(argument.name))
        args, kwargs = tree_map_only(PackedWeight, _dense, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape, dtype = tuple(self.shape), self.dtype
        return f"PackedWeight({self.spec}, shape={shape}, dtype={dtype}, device={self.device})"


def pack(
    values: Tensor,
    spec: QuantizerSpec,
    scales: Scales | None,
    *,
    dtype: torch.dtype | None = None,
    stride: tuple[int, ...] | None = None,
) -> PackedWeight:
    """Quantize a tensor into a `PackedWeight`.

    Args:
        values: What is rounded.
        spec: Format and granularity.
        scales: Its scales; computed from it by default.
        dtype: Dtype it is unpacked to; its own by default.
        stride: Strides of what it is unpacked to; contiguous by default.

    Raises:
        NumericsError: It holds NaN or Inf, or the scales do not fit.
    """
    parts = compact(quantize(values, spec, scales))
    shape = tuple(values.shape)
    return PackedWeight(parts, spec, shape=shape, dtype=dtype or values.dtype, stride=stride)


def empty_packed(like: Tensor, spec: QuantizerSpec) -> PackedWeight:
    """Return a `PackedWeight` in the place of a plain weight, whose codes are to be loaded.

    Args:
        like: Gives shape, dtype, strides and device.
        spec: Format and granularity.

    Raises:
        NumericsError: The weight has too few dimensions for the granularity.
    """
    shape = tuple(like.shape)
    parts = {
        name: torch.zeros(extents, dtype=torch.uint8, device=like.device).to(dtype)
        if dtype.itemsize == 1
        else torch.zeros(extents, dtype=dtype, device=like.device)
        for name, (extents, dtype) in compact_layout(shape, spec).items()
    }
    return PackedWeight(parts, spec, shape=shape, dtype=like.dtype, stride=like.stride())


# --- on disk --------------------------------------------------------------------------------------


def flatten_packed(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """Return the plain tensors of a packed weight, under names for a file.

    Args:
        name: Name of the parameter.
        weight: It.
    """
    return {f"{PACKED}{name}/{part}": tensor for part, tensor in weight.parts.items()}


def unflatten_packed(name: str, tensors: Mapping[str, Tensor], like: PackedWeight) -> PackedWeight:
    """Undo `flatten_packed`.

    Args:
        name: Name of the parameter in the file.
        tensors: Tensors of the file.
        like: The live parameter it is for, see `empty_packed`.

    Raises:
        CheckpointError: A part is missing, or has another shape or dtype than the live one.
    """
    parts = {}
    for part, own in like.parts.items():
        found = tensors.get(f"{PACKED}{name}/{part}")
        if found is None:
            raise CheckpointError(
                f"the {part} of the packed weight are missing",
                where=name,
                hint="copy or download the whole directory again",
            )
        if found.shape != own.shape or found.dtype != own.dtype:
            raise CheckpointError(
                f"the {part} of the packed weight are {tuple(found.shape)} of {found.dtype}, not "
                f"{tuple(own.shape)} of {own.dtype}",
                where=name,
                hint="restore into a model of the same architecture",
            )
        parts[part] = found
    shape = tuple(like.shape)
    return PackedWeight(parts, like.spec, shape=shape, dtype=like.dtype, stride=like.stride())


# --- functions that keep a weight packed, or fill one ---------------------------------------------


def _dense(weight: PackedWeight) -> Tensor:
    """Return what the codes stand for, in the weight's dtype and layout."""
    values = decode(weight.parts, tuple(weight.shape), weight.spec, weight.dtype)
    if values.stride() == weight.stride():
        return values
    found = torch.empty_strided(
        weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
    )
    return found.copy_(values)


def _changed(
    weight: PackedWeight,
    change: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> PackedWeight:
    """Return a packed weight with other tensors inside."""
    parts = {name: change(part) for name, part in weight.parts.items()}
    stride = weight.stride()
    if memory_format not in (None, torch.preserve_format):
        stride = torch.empty(weight.shape, device="meta", memory_format=memory_format).stride()
    dtype = weight.dtype if dtype is None else dtype
    return PackedWeight(parts, weight.spec, shape=tuple(weight.shape), dtype=dtype, stride=stride)


def _detach(weight: PackedWeight) -> PackedWeight:
    return _changed(weight, lambda part: part.detach())


def _clone(
    weight: PackedWeight, *, memory_format: torch.memory_format | None = None
) -> PackedWeight:
    return _changed(weight, lambda part: part.clone(), memory_format=memory_format)


def _to_copy(
    weight: PackedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
    **rest: Any,
) -> Tensor:
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        return _dense(weight).to(dtype=dtype, device=device)
    return _changed(
        weight,
        lambda part: part.to(device=device, non_blocking=non_blocking, copy=True),
        dtype,
        memory_format,
    )


def _empty_like(
    weight: PackedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **rest: Any,
) -> PackedWeight:
    return _changed(weight, lambda part: torch.empty_like(part, device=device), dtype)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Fill a packed weight from another one, or a plain tensor with what one stands for."""
    if not isinstance(target, PackedWeight):
        assert isinstance(source, PackedWeight)
        return target.copy_(_dense(source), non_blocking=non_blocking)
    if not isinstance(source, PackedWeight):
        # DDP sends the numbers of rank 0 to all others, which hold the same
        if source.shape == target.shape and torch.equal(
            source.to(target.device, target.dtype), _dense(target)
        ):
            return target
        raise NumericsError(
            "this weight is packed, and a plain tensor has no codes for it",
            hint="load it into a model that is not compressed, and compress that",
        )
    for name, part in target.parts.items():
        given = source.parts.get(name)
        if given is None or given.shape != part.shape or given.dtype != part.dtype:
            raise NumericsError(
                f"a weight packed as {source.spec} does not fit one packed as {target.spec}",
                hint="load it into a model that was quantized by the same recipe",
            )
    for name, part in target.parts.items():
        part.copy_(source.parts[name], non_blocking=non_blocking)
    return target


_KNOWN: dict[Any, Callable[..., Any]] = {
    aten.dequantize.self: _dense,
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
}


def _check_not_written(func: Any, argument: Any, given: object) -> None:
    alias = argument.alias_info
    given = given if isinstance(given, list | tuple) else (given,)
    if alias is not None and alias.is_write and any(isinstance(x, PackedWeight) for x in given):
        raise NumericsError(
            f"a packed weight cannot be changed in place, and {func} does that",
            hint="bittern.revert(model) makes a plain parameter of it",
        )
