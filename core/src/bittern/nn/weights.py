"""The quantized weights of a model, each once, with everyone who reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bittern.nn.module import QuantModule, named_quant_modules, refilled
from bittern.nn.packed import PackedWeight
from bittern.nn.quantizer import TensorQuantizer
from bittern.runtime.ondisk import on_disk

__all__ = ["Reader", "SharedWeight", "quantized_weights", "readers_of"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A module that quantizes a weight before it uses it.

    Attributes:
        path: Path of the module.
        module: The module.
        tensor: Name of the parameter.
        quantizer: What quantizes it.
    """

    path: str
    module: QuantModule
    tensor: str
    quantizer: TensorQuantizer

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.path}.{self.tensor}" if self.path else self.tensor


@dataclass(frozen=True, eq=False)
class SharedWeight:
    """A parameter and those who quantize it: one, or several where it is tied.

    Attributes:
        parameter: The parameter.
        readers: Those.
    """

    parameter: nn.Parameter
    readers: tuple[Reader, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Its full names, one per reader."""
        return tuple(reader.name for reader in self.readers)

    @property
    def quantizers(self) -> tuple[TensorQuantizer, ...]:
        """The quantizers of the readers."""
        return tuple(reader.quantizer for reader in self.readers)

    def rounded(self) -> Tensor | None:
        """Return what its readers compute with; ``None`` where they do not agree on it."""
        with torch.inference_mode(False), torch.no_grad():  # it may serve training later
            source = self.parameter.detach()
            first: Tensor = self.quantizers[0](source)
            agreed = all(torch.equal(first, other(source)) for other in self.quantizers[1:])
        return first if agreed else None


def readers_of(model: nn.Module) -> Iterator[Reader]:
    """Yield everyone who quantizes a weight, also one that is computed from other parameters."""
    for path, module in named_quant_modules(model):
        for quantizer in module.slots().values():
            if quantizer.tensor is not None:
                yield Reader(path, module, quantizer.tensor, quantizer)


def quantized_weights(model: nn.Module) -> tuple[list[SharedWeight], dict[str, str]]:
    """Return the weights that hold numbers that somebody quantizes, and why others are left out.

    Returns:
        The weights, in the model's order; and the names of quantized weights that nothing can be
        put in the place of, with the reason.
    """
    readers: dict[int, list[Reader]] = {}
    left: dict[str, str] = {}
    for reader in readers_of(model):
        parameter = reader.module._parameters.get(reader.tensor)
        if parameter is None:
            left[reader.name] = "it is no parameter but computed from others"
        else:
            readers.setdefault(id(parameter), []).append(reader)
    others = _other_places(model, readers)
    found = []
    for key, places in readers.items():
        parameter = places[0].module._parameters[places[0].tensor]
        assert parameter is not None
        weight = SharedWeight(parameter, tuple(places))
        reason = _reason(weight, others.get(key))
        if reason:
            left |= dict.fromkeys(weight.names, reason)
        else:
            found.append(weight)
    return found, left


def _other_places(model: nn.Module, readers: Mapping[int, list[Reader]]) -> dict[int, str]:
    """Return the first place, by parameter, that reads a quantized weight as it is."""
    known = {(id(r.module), r.tensor) for places in readers.values() for r in places}
    others: dict[int, str] = {}
    for path, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if id(parameter) in readers and (id(module), local) not in known:
                others.setdefault(id(parameter), f"{path}.{local}" if path else local)
    return others


def _reason(weight: SharedWeight, other: str | None) -> str:
    """Return why a weight has to stay as it is, nothing if it has not."""
    parameter = weight.parameter
    if isinstance(parameter, PackedWeight):
        return "it is packed already"
    if any(quantizer.folded for quantizer in weight.quantizers):
        return "it is folded already"
    if any(on_disk(reader.module) for reader in weight.readers):
        return "it lies on the disk"
    if parameter.device.type == "meta":
        return "it is on the meta device, offloaded or never loaded"
    if any(refilled(reader.module) for reader in weight.readers):
        return "it lies in shards (FSDP2), from which it is filled in every forward pass"
    if parameter.numel() == 0:
        return "it is empty"
    if other is not None:
        return f"{other} is the same tensor, and reads it unquantized"
    if not all(q.enabled and q.calibrated for q in weight.quantizers):
        return "its quantizer is switched off or not calibrated"
    if any(q.observer is not None for q in weight.quantizers):
        return "it is being calibrated"
    return ""
