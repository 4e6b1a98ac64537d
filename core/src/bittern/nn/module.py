"""QuantModule: a module whose class was swapped in place for a quantized subclass.

The swap keeps the object, its parameters and their names, its hooks, its place in the model and
its ``isinstance`` answers; it adds one child `TensorQuantizer` per slot.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import isfunction
from typing import Any, ClassVar

from torch import Tensor, nn

from bittern.nn.experts import Experts
from bittern.nn.quantizer import TensorQuantizer
from bittern.runtime.ondisk import on_disk

__all__ = [
    "QuantModule",
    "attach",
    "class_without",
    "named_quant_modules",
    "named_quantizers",
    "original_class",
    "quantizer_keys",
    "quantizers_of",
    "quantizers_off",
    "refilled",
    "restore_class",
    "swap_class",
    "switched_off",
]

SUFFIX = "_quantizer"
SHARDED = "_is_fsdp_managed_module"  # what fully_shard writes into every module that it manages


class QuantModule(nn.Module):
    """Base of the mixins that plugins and core write: quantized forward passes.

    A subclass implements ``forward`` for the class its rule targets and calls ``self.quantize``
    on the tensors of its slots. A slot without a quantizer passes its tensor unchanged.

    Attributes:
        original_class: The class a module had before conversion.
        branched: Whether ``forward`` adds the low-rank branch of the slot ``weight``, by
            `bittern.nn.lowrank.with_branch`.
    """

    original_class: type[nn.Module]
    branched: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the original's own hook out: its registries are to find no converted class."""

    def quantize(self, slot: str, x: Tensor, experts: Experts | None = None) -> Tensor:
        """Return ``x`` through the quantizer of ``slot``, unchanged where there is none.

        Args:
            slot: The slot.
            x: Its tensor.
            experts: Which rows belong to which expert, for stacked activations.
        """
        quantizer = self._modules.get(slot + SUFFIX)
        if quantizer is None:
            return x
        if type(x) is nn.Parameter and not x.requires_grad and refilled(self):  # cheap ones first
            x = x.detach()  # a parameter would be quantized once, and this one is refilled unseen
        result: Tensor = quantizer(x, experts)
        return result

    def quantizer(self, slot: str) -> TensorQuantizer | None:
        """Return the quantizer of ``slot``."""
        found = self._modules.get(slot + SUFFIX)
        return found if isinstance(found, TensorQuantizer) else None

    def slots(self) -> dict[str, TensorQuantizer]:
        """Return the quantizers by slot."""
        return {
            name.removesuffix(SUFFIX): child
            for name, child in self._modules.items()
            if isinstance(child, TensorQuantizer)
        }

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the mixin and the original class in a pickle: the class itself is in no file."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        cls = type(self)
        if "original_class" not in vars(cls) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_bare, (cls.__bases__[0], cls.original_class), *reduced[2:])


_CLASSES: dict[tuple[type, type], type] = {}


def swap_class(
    module: nn.Module, quantized: type[QuantModule], quantizers: dict[str, TensorQuantizer]
) -> None:
    """Turn ``module`` into an instance of ``quantized`` and its own class, in place."""
    attach(module, _class_of(quantized, type(module)), quantizers)


def _class_of(quantized: type, own: type) -> type:
    """Return the class of converted modules, the same object every time."""
    key = (quantized, own)
    if key not in _CLASSES:
        name = f"Quant{own.__name__}"
        body = {"original_class": own, "__module__": quantized.__module__, "__qualname__": name}
        _CLASSES[key] = type(name, (quantized, own), body)
    return _CLASSES[key]


def _bare(quantized: type, own: type) -> Any:
    """Return a converted module without anything in it, for pickle to fill."""
    cls: Any = _class_of(quantized, own)
    return cls.__new__(cls)


def attach(module: nn.Module, cls: type, quantizers: dict[str, TensorQuantizer]) -> None:
    """Give ``module`` a class that `swap_class` made, and its quantizers."""
    module.__class__ = cls
    for slot, quantizer in quantizers.items():
        module.add_module(slot + SUFFIX, quantizer.train(module.training))


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`; a module that was never swapped stays as it is."""
    if isinstance(module, QuantModule):
        for slot in list(module.slots()):
            del module._modules[slot + SUFFIX]
        own: Any = class_without(module)
        module.__class__ = own


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class a module had before conversion."""
    return module.original_class if isinstance(module, QuantModule) else type(module)


def class_without(module: QuantModule) -> type[nn.Module]:
    """Return the class that `restore_class` gives a module.

    Frameworks put classes of their own on top of a module's (``fully_shard`` of FSDP2,
    ``parametrize``). Such a class is built again on top of the original one.

    Args:
        module: A converted module.

    Raises:
        TypeError: That cannot be done: a method on top calls ``super()``, which is bound to the
            class that it was written in; or nothing in the class was made by `swap_class`.
    """
    cls: Any = type(module)  # mypy takes a class for unhashable
    found: type[nn.Module] = _class_without(cls)
    return found


@cache
def _class_without(cls: Any) -> Any:
    if "original_class" in vars(cls):
        return cls.original_class
    made = next((base for base in cls.__mro__ if "original_class" in vars(base)), None)
    if made is None:
        raise TypeError(f"{cls.__qualname__} is not a class of a converted module")
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    if any(map(_calls_super, body.values())):
        raise TypeError(f"{cls.__qualname__} has methods that call super()")
    bases = tuple(_class_without(b) if issubclass(b, made) else b for b in cls.__bases__)
    name = cls.__name__.replace(made.__name__, made.original_class.__name__)
    meta: Any = type(cls)
    return meta(name, bases, body)


def _calls_super(value: Any) -> bool:
    """Whether an attribute of a class is a method, or property, that calls ``super()``."""
    functions = (value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset")))
    return any("__class__" in f.__code__.co_freevars for f in functions if isfunction(f))


def refilled(module: nn.Module) -> bool:
    """Whether a module's weights come anew in every pass: from FSDP2's shards, or from the disk."""
    return SHARDED in module.__dict__ or on_disk(module)


def named_quant_modules(model: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    """Yield ``(path, module)`` of every converted module."""
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            yield name, module


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield ``("module.path.slot", quantizer)`` of every quantizer, with ``.then`` down a chain."""
    for name, module in named_quant_modules(model):
        yield from quantizers_of(name, module)


def quantizers_of(name: str, module: QuantModule) -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield ``("name.slot", quantizer)`` of one module, with ``.then`` down a chain."""
    for slot, quantizer in module.slots().items():
        path = f"{name}.{slot}" if name else slot
        for step, link in enumerate(quantizer.chain()):
            yield path + ".then" * step, link


def quantizer_keys(model: nn.Module) -> set[str]:
    """Return the ``state_dict`` keys that are learned ranges, and not the original model's."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
        for name, _ in module.named_parameters(recurse=False)
    }


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Switch every quantizer of a model off: it computes what the original did, bit for bit."""
    with switched_off(q for _, q in named_quantizers(model)):
        yield


@contextmanager
def switched_off(quantizers: Iterable[TensorQuantizer]) -> Iterator[None]:
    """Switch some quantizers off while the block runs; those that were off stay so.

    Args:
        quantizers: The quantizers.
    """
    were_on = [quantizer for quantizer in quantizers if quantizer.enabled]
    try:
        for quantizer in were_on:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in were_on:
            quantizer.enabled = True
