"""The quantized weights of a model, as codes and scales: what every exporter packs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bittern.errors import ExportError
from bittern.nn import QuantModule, TensorQuantizer, named_quant_modules, named_quantizers
from bittern.nn.computed import sources_of, weight_of
from bittern.nn.packed import PackedWeight
from bittern.numerics import Quantized, quantize
from bittern.records import Plan
from bittern.runtime.ondisk import places_of

__all__ = ["PackedModule", "check_calibrated", "check_plan", "packed_modules", "plain_tensors"]


@dataclass(frozen=True)
class PackedModule:
    """One quantized module, ready to be written.

    Attributes:
        path: Dotted path.
        module: The live module.
        weights: Parameter name to its codes and scales.
        inputs: Slot to the scale of a static activation quantizer, float32; the global scale
            where that alone is static.
        zero_points: Slot to the zero point of one that is asymmetric.
        quantizers: Slot to quantizer.
    """

    path: str
    module: QuantModule
    weights: Mapping[str, Quantized]
    inputs: Mapping[str, Tensor]
    zero_points: Mapping[str, Tensor]
    quantizers: Mapping[str, TensorQuantizer]


def check_calibrated(model: nn.Module) -> None:
    """Raise if codes and scales of a model would not be what it computes.

    Raises:
        ExportError: A static quantizer has no scale, or one of NaN or Inf; one is switched off, or
            does more than rounding; with the first names and what to do.
    """
    missing = [name for name, q in named_quantizers(model) if not q.calibrated]
    if missing:
        some = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise ExportError(
            f"{len(missing)} quantizers saw no data: {some}",
            hint="calibrate with more data, that reaches them; or switch their slots off in the "
            "recipe; or give experts the largest range of the others by allow_uncalibrated=True, "
            "--allow-uncalibrated",
        )
    broken = [name for name, q in named_quantizers(model) if not _finite(q)]
    if broken:
        raise ExportError(
            f"ranges hold NaN or Inf: {', '.join(broken[:8])}",
            hint="calibrate again; in training, look for a loss of NaN",
        )
    off = [name for name, q in named_quantizers(model) if not q.enabled]
    if off:
        raise ExportError(
            f"{_few(off)} switched off: the files would hold what the model does not compute",
            hint="enable them, or switch their slots off in the recipe",
        )
    _refuse(n for n, q in named_quantizers(model) if q.transforms is not None or q.then is not None)


def _finite(quantizer: TensorQuantizer) -> bool:
    state = quantizer.state().values()
    return all(bool(value.isfinite().all()) for value in state if value.is_floating_point())


def check_plan(plan: Plan) -> None:
    """Raise if a plan asks for more than rounding: that shows before any calibration.

    Raises:
        ExportError: With the first names and what to do.
    """
    _refuse(
        entry.path
        for entry in plan.entries
        if (spec := entry.spec).rotation is not None
        or spec.affine is not None
        or spec.then is not None
    )


def _refuse(names: Iterable[str]) -> None:
    found = list(names)
    if found:
        raise ExportError(
            f"{_few(found)} chained, rotated, scaled before, biased or beside a "
            "low-rank branch, which no file format holds",
            hint="bittern.save keeps all of it; to export, use a recipe without",
        )


def _few(names: list[str]) -> str:
    some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{some} {'is' if len(names) == 1 else 'are'}"


def packed_modules(
    model: nn.Module, access: Callable[..., AbstractContextManager[None]]
) -> Iterator[PackedModule]:
    """Yield the quantized modules one by one, packed; only one is in memory at a time."""
    for path, module in named_quant_modules(model):
        slots = module.slots()
        if not slots:  # it only calls its quantized children
            continue
        weights: dict[str, Quantized] = {}
        inputs: dict[str, Tensor] = {}
        zero_points: dict[str, Tensor] = {}
        with access(module, write=False):
            for slot, quantizer in slots.items():
                if quantizer.tensor is not None:
                    tensor = weight_of(module, quantizer.tensor)
                    assert tensor is not None
                    weights[quantizer.tensor] = _codes(tensor, quantizer)
                    continue
                scale = quantizer.global_scale if quantizer.block_dynamic else quantizer.scale
                if scale is not None:
                    inputs[slot] = scale
                if quantizer.zero_point is not None:
                    zero_points[slot] = quantizer.zero_point
        yield PackedModule(path, module, weights, inputs, zero_points, slots)


def _codes(weight: Tensor, quantizer: TensorQuantizer) -> Quantized:
    if isinstance(weight, PackedWeight):
        return weight.quantized()
    return quantize(weight.detach(), quantizer.spec, quantizer.scales)


def plain_tensors(model: nn.Module, plan: Plan, *, dtype: str | None) -> dict[str, Tensor]:
    """Return the tensors that stay as they are, shared storage once, in their dtype on disk.

    Args:
        model: The converted model.
        plan: Its plan; the weights it quantizes are left out.
        dtype: Name of the dtype on disk of floating tensors, ``None`` for the one in memory.
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # shared modules: every name
    weights = [(e.module, e.tensor) for e in plan.entries if e.tensor is not None]
    packed = {(id(modules[path]), tensor) for path, tensor in weights}
    sources = tuple(sources_of(path, tensor) + "." for path, tensor in weights)
    wanted = getattr(torch, dtype) if dtype is not None else None
    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    storages: set[int] = set()
    elsewhere = places_of(model)
    for name, held in model.state_dict().items():
        path, _, local = name.rpartition(".")
        if not isinstance(held, Tensor) or (id(modules.get(path)), local) in packed:
            continue
        if name.startswith(sources):  # what a computed weight was computed from
            continue
        tensor = elsewhere[name].load(held.dtype) if name in elsewhere else held
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if key in seen:
                continue
            seen.add(key)
        convert = wanted is not None and tensor.is_floating_point()
        plain = (tensor.to(wanted) if convert else tensor).contiguous()
        storage = plain.untyped_storage().data_ptr()
        if storage in storages:  # a part of another tensor; safetensors refuses the overlap
            plain = plain.clone()
        storages.add(storage)
        found[name] = plain
    return found
