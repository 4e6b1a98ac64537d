"""The tensors of a quantized model by their names in files.

The model's own keep the names of its ``state_dict``, without what wrappers put into them. What the
quantizers found out is ``bittern.quantizers/<module>.<slot>/<name>``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bittern.convert import LiveNames
from bittern.nn import named_quantizers, quantizer_keys

__all__ = [
    "QUANTIZERS",
    "load_quantizers",
    "own_names",
    "own_tensors",
    "quantizer_tensors",
    "split",
    "unaliased",
]

QUANTIZERS = "bittern.quantizers/"
AMAX = "_quantizer.amax"  # how schema 1 ended the name of a range


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``state_dict`` under their live names, without learned ranges."""
    learned = quantizer_keys(model)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and name not in learned
    }


def own_names(model: nn.Module) -> LiveNames:
    """Return how the model's own tensors are called in files."""
    return LiveNames(own_tensors(model))


def unaliased(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each storage once, and which names share which one."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor.detach().cpu().contiguous()
    return kept, aliases


def quantizer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what the quantizers found out, by name in files."""
    quantizers = dict(named_quantizers(model))
    names = LiveNames(quantizers)
    return {
        f"{QUANTIZERS}{names.saved(name)}/{local}": value.detach().cpu().contiguous()
        for name, quantizer in quantizers.items()
        for local, value in quantizer.state().items()
    }


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's own tensors, and the quantizers'."""
    own: dict[str, Tensor] = {}
    quantizers: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(QUANTIZERS):
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
    """
    states: dict[str, dict[str, Tensor]] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for key, value in tensors.items():
        name, _, local = key.removeprefix(QUANTIZERS).rpartition("/")
        states.setdefault(name, {})[local] = value.to(device)
    quantizers = dict(named_quantizers(model))
    names = LiveNames(quantizers)
    for name, quantizer in quantizers.items():
        state = states.get(names.saved(name), states.get(name, {}))
        if set(state) == {"amax"} and not quantizer.spec.dynamic:
            quantizer.set_amax(state["amax"])  # schema 1 had no scales
        else:
            quantizer.load_state(state)
