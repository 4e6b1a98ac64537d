"""The tensors of a quantized model by their names in files.

The model's own keep the names of its ``state_dict``, without what wrappers put into them. What the
quantizers found out is ``bittern.quantizers/<module>.<slot>/<name>``. Packed weights are of our
making, and no tensors of the model: their parts are ``bittern.packed/<parameter>/<part>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bittern.convert import LiveNames, unwrapped
from bittern.errors import CheckpointError
from bittern.nn import named_quantizers, quantizer_keys
from bittern.nn.packed import PACKED, PackedWeight, flatten_packed, unflatten_packed
from bittern.runtime.access import is_sharded, resident

__all__ = [
    "QUANTIZERS",
    "aliases_in",
    "apart",
    "check_tensors",
    "load_quantizers",
    "own_names",
    "own_tensors",
    "quantizer_tensors",
    "split",
]

QUANTIZERS = "bittern.quantizers/"
AMAX = "_quantizer.amax"  # how schema 1 ended the name of a range


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the plain tensors of ``state_dict`` under their live names, no learned ranges."""
    learned = quantizer_keys(model)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
        and name not in learned
        and not isinstance(tensor, PackedWeight)
    }


def check_tensors(model: nn.Module) -> None:
    """Raise if something that belongs to a model would not be in the files.

    Args:
        model: A model, or what wraps it.

    Raises:
        CheckpointError: A module's ``get_extra_state`` returns something that is no tensor, for
            which there is no file without pickle; or a wrapper has parameters of its own, as
            prompts of peft are.
    """
    inner = unwrapped(model)
    within = {id(parameter) for parameter in inner.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in within:
            raise CheckpointError(
                f"{name} belongs to the {type(model).__name__} around the model, and would be lost",
                hint="save the model within, and what is around it by its own means",
            )
    for name, value in inner.state_dict().items():
        if value is not None and not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} is a {type(value).__name__} and no tensor, and would be lost",
                hint="let get_extra_state return a tensor; or save with state_only=True, beside "
                "weights that you keep",
            )


def own_names(model: nn.Module) -> LiveNames:
    """Return how the model's own tensors are called in files."""
    return LiveNames(model, own_tensors(model))


def aliases_in(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which names share storage with which, the first of each."""
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        shard: Any = tensor
        memory = shard.to_local() if is_sharded(tensor) else tensor
        key = (memory.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not memory.numel() or (first := seen.setdefault(key, name)) is name:
            continue
        aliases[name] = first
    return aliases


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU that overlap nowhere: safetensors writes no memory twice."""
    found: dict[str, Tensor] = {}
    ends: dict[int, int] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        value = tensor.cpu().contiguous()
        storage, start = value.untyped_storage().data_ptr(), value.data_ptr()
        if start < ends.get(storage, 0):
            value = value.clone()
        else:
            ends[storage] = start + value.nbytes
        found[name] = value
    return found


def quantizer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what the quantizers found out, and packed weights, by name in files."""
    quantizers = dict(named_quantizers(model))
    names = LiveNames(model)
    weights = _packed(model)
    packed = {
        key: part.detach().cpu().contiguous()
        for name, weight in weights.items()
        for key, part in flatten_packed(names.saved(name), weight).items()
    }
    found = {}
    for name, quantizer in quantizers.items():
        with resident(quantizer, write=False):  # a learned range may lie in shards
            for local, value in quantizer.state().items():
                found[f"{QUANTIZERS}{names.saved(name)}/{local}"] = value.cpu().contiguous()
    return packed | found


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's own tensors, and the quantizers'."""
    own: dict[str, Tensor] = {}
    quantizers: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith((QUANTIZERS, PACKED)):
            quantizers[name] = tensor
        elif name.endswith(AMAX):
            quantizers[f"{QUANTIZERS}{name.removesuffix(AMAX)}/amax"] = tensor
        else:
            own[name] = tensor
    return own, quantizers


def load_quantizers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the quantizers of a converted model what `quantizer_tensors` returned.

    Raises:
        NumericsError: A quantizer has no such state.
        CheckpointError: The packed weights or the quantizers are not those of the model.
    """
    _load_packed(model, {name: t for name, t in tensors.items() if name.startswith(PACKED)})
    states: dict[str, dict[str, Tensor]] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for key, value in tensors.items():
        if key.startswith(PACKED):
            continue
        name, _, local = key.removeprefix(QUANTIZERS).rpartition("/")
        states.setdefault(name, {})[local] = value.to(device)
    quantizers = dict(named_quantizers(model))
    names = LiveNames(model)
    for name in states.keys() - {n for q in quantizers for n in (q, names.saved(q))}:
        raise CheckpointError(
            f"it holds what a quantizer {name!r} found out, and the model has none of that name",
            hint="restore into a model of the same architecture",
        )
    for name, quantizer in quantizers.items():
        state = states.get(names.saved(name), states.get(name, {}))
        if set(state) == {"amax"} and not quantizer.spec.dynamic:
            quantizer.set_amax(state["amax"])  # schema 1 had no scales
        else:
            quantizer.load_state(state)


def _packed(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the packed weights under their live names, tied ones once."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, PackedWeight)}


@torch.no_grad()
def _load_packed(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    weights, names = _packed(model), LiveNames(model)
    known = {key for name, w in weights.items() for key in flatten_packed(names.saved(name), w)}
    for key in tensors:
        if key not in known:
            raise CheckpointError(
                f"{key} is of no weight that this model has packed",
                hint="restore into a model of the same architecture",
            )
    for name, weight in weights.items():
        weight.copy_(unflatten_packed(names.saved(name), tensors, like=weight))
