"""What a part's calibration changed in a model, as tensors that put it back into another one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.errors import CalibrationError
from bittern.nn import named_quant_modules, named_quantizers, quantizers_of
from bittern.runtime import Fingerprint
from bittern.runtime.access import whole
from bittern.runtime.ondisk import places_of

__all__ = ["changes", "put_back", "sampled", "versions"]

_RANGES = "ranges:"

# Name to the tensor and the number of writes to it.
Versions = dict[str, tuple[int, int]]


def versions(model: nn.Module) -> Versions:
    """Return what tells whether a tensor of the model is written to or replaced."""
    return {name: (id(tensor), tensor._version) for name, tensor in _own(model).items()}


def changes(model: nn.Module, modules: Collection[str], before: Versions) -> dict[str, Tensor]:
    """Return the tensors of a model that changed, and the state of the quantizers of ``modules``.

    Args:
        model: The converted model.
        modules: Paths of the modules that were calibrated.
        before: What `versions` returned.
    """
    found = {
        name: tensor.detach()
        for name, tensor in _own(model).items()
        if before.get(name) != (id(tensor), tensor._version)
    }
    for module, quantized in named_quant_modules(model):
        for path, quantizer in quantizers_of(module, quantized) if module in modules else ():
            for name, tensor in quantizer.state().items():
                found[f"{_RANGES}{path}/{name}"] = tensor
    return found


@torch.no_grad()
def put_back(model: nn.Module, found: Mapping[str, Tensor], context: CalibrationContext) -> None:
    """Give a model what `changes` returned.

    Raises:
        CalibrationError: The model has no tensor of that name.
    """
    quantizers, elsewhere = dict(named_quantizers(model)), places_of(model)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        if name.startswith(_RANGES):
            path, _, state = name.removeprefix(_RANGES).rpartition("/")
            states.setdefault(path, {})[state] = tensor
            continue
        if name in elsewhere:  # it stays on the disk, in the work directory from now on
            continue
        path, _, local = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(getattr(module, local, None), Tensor):
            raise CalibrationError(
                f"the work directory holds {name}, which this model does not have",
                hint="remove the work directory to begin anew",
            )
        with context.access(module, write=True):
            context.remember(module, local)
            getattr(module, local).copy_(tensor)
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    for path, values in states.items():
        quantizers[path].load_state({name: value.to(device) for name, value in values.items()})


def sampled(model: nn.Module) -> dict[str, str]:
    """Return a hash of every tensor's shape, dtype and up to 64 evenly spread elements."""
    found = {}
    elsewhere = places_of(model)
    for name, tensor in _own(model).items():
        real = elsewhere[name].load() if name in elsewhere else tensor.detach()
        flat = whole(real).reshape(-1)
        few = flat[:: max(1, len(flat) // 64)].to(tensor.dtype, copy=True)
        mark = Fingerprint()
        mark.update([str(tuple(tensor.shape)), few])
        mark.close()
        found[name] = mark.value[-12:]
    return found


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, each once, without those of quantizers."""
    inside = {id(m) for _, q in named_quantizers(model) for m in q.modules()}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if id(module) not in inside:
            prefix = f"{path}." if path else ""
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            found |= {prefix + name: tensor for name, tensor in own}
    first = {id(tensor): name for name, tensor in reversed(found.items())}
    return {name: tensor for name, tensor in found.items() if first[id(tensor)] == name}
