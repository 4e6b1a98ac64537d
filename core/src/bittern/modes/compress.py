"""The mode ``compress``: quantized weights are held as codes and scales, in their real size.

The model computes the same bits. What a weight was before it was rounded is gone then, and its
range with it: it can be neither trained nor calibrated again. Its input can, so that adapters which
are trained beside frozen weights (QLoRA) find what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bittern.convert import LiveNames, modes_of, unwrapped
from bittern.errors import CheckpointError, NumericsError, PlanError
from bittern.modes.context import ModeContext
from bittern.modes.names import readers_named
from bittern.nn.module import refilled
from bittern.nn.packed import PackedWeight, empty_packed, pack
from bittern.nn.weights import Reader, SharedWeight, quantized_weights

__all__ = ["convert", "metadata", "restore", "stored_bytes"]


NAME = "compress"


def convert(model: nn.Module, config: Mapping[str, Any], context: ModeContext) -> dict[str, Any]:
    """Pack the weights of a quantized model, in place.

    A weight that cannot be packed stays as it is and is named in the metadata, with the reason:
    one whose codes stand for anything else than what the model computes with (an inexact backend),
    one that other modules read as it is, one that is computed, offloaded or folded.

    Returns:
        ``packed``: names of the packed parameters; ``left``: those of the others, with the reason.

    Raises:
        PlanError: There is no weight to pack.
    """
    weights, left = quantized_weights(model)
    names: list[str] = []
    for weight in weights:
        packed = _packed(weight)
        if isinstance(packed, str):
            left |= dict.fromkeys(weight.names, packed)
            continue
        _replace(weight.readers, packed)
        names += weight.names
    if not names:
        why = next((f"{name}: {reason}" for name, reason in left.items()), None)
        raise PlanError(
            "there is no quantized weight that can be packed",
            hint=why or "call bittern.quantize(model, recipe) first",
        )
    saved = LiveNames(model).saved
    return {
        "packed": [saved(name) for name in names],
        "left": {saved(name): why for name, why in left.items()},
    }


def metadata(model: nn.Module) -> dict[str, Any]:
    """Return nothing new, but see that the packed weights are packed still.

    Raises:
        PlanError: Something made plain tensors of them, as ``fully_shard`` does; the state could
            be restored by nobody.
    """
    model = unwrapped(model)
    for applied in modes_of(model):
        if applied.name != NAME:
            continue
        for reader in readers_named(model, applied.metadata.get("packed"), what="packed"):
            parameter = reader.module._parameters[reader.tensor]
            if not isinstance(parameter, PackedWeight):
                raise PlanError(
                    f"{reader.name} was packed, and is a {type(parameter).__name__} now",
                    hint="save the model before it is put into shards",
                )
    return {}


def restore(
    model: nn.Module, config: Mapping[str, Any], metadata: Mapping[str, Any], context: ModeContext
) -> Callable[[], None]:
    """Put empty packed weights, for codes to be loaded into, in the place of a model's weights.

    Raises:
        CheckpointError: The metadata is malformed, or of another model.
    """
    readers = readers_named(model, metadata.get("packed"), what="packed")
    together: dict[int, list[Reader]] = {}
    for reader in readers:
        together.setdefault(id(reader.module._parameters[reader.tensor]), []).append(reader)
    for tied in together.values():
        parameter = tied[0].module._parameters[tied[0].tensor]
        assert parameter is not None
        if any(refilled(reader.module) for reader in tied):
            raise CheckpointError(
                f"{tied[0].name} is packed there, and lies in shards here",
                hint="restore into the plain model, and shard it afterwards",
            )
        try:
            packed = empty_packed(parameter, tied[0].quantizer.spec)
        except NumericsError as error:
            raise CheckpointError(error.what, where=tied[0].name, hint=error.hint) from error
        _replace(tied, packed)

    def finish() -> None:
        for reader in readers:  # the state held no ranges for them
            reader.quantizer.give_up_range()

    return finish


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, what quantizers hold included.

    Packed weights count as what they take in memory; tied ones count once.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(
        t.stored_bytes if isinstance(t, PackedWeight) else t.nbytes for t in tensors.values()
    )


def _packed(weight: SharedWeight) -> PackedWeight | str:
    """Return the packed form of a weight, or why there is none."""
    for reader in weight.readers:
        if getattr(reader.module, "max_norm", None) is not None:
            return "its module changes it in place (max_norm)"
    if type(weight.parameter) is not nn.Parameter:
        return f"it is a {type(weight.parameter).__name__}"
    quantizer, source = weight.quantizers[0], weight.parameter.detach()
    transforms = quantizer.transforms
    if transforms is not None and transforms.affine is not None and transforms.affine.dynamic:
        return "its bias is computed from it in every forward"
    rounded = weight.rounded()
    if rounded is None:
        return "its readers do not quantize it alike"
    with torch.inference_mode(False), torch.no_grad():  # it may serve training later
        values = source if transforms is None else transforms.prepare(source.float())[0]
        try:
            packed = pack(
                values,
                quantizer.spec,
                quantizer.scales,
                dtype=source.dtype,
                stride=rounded.stride(),
            )
        except NumericsError as error:
            return error.what
        same = torch.equal(quantizer(packed), rounded)
    return packed if same else "its codes stand for something else than the model computes with"


def _replace(readers: tuple[Reader, ...] | list[Reader], packed: PackedWeight) -> None:
    """Put a packed weight in the place of a parameter, and free what that took."""
    old = readers[0].module._parameters[readers[0].tensor]
    assert old is not None
    parameter = nn.Parameter(packed, requires_grad=False)
    for reader in readers:
        reader.quantizer.was_trained = old.requires_grad
        reader.quantizer.give_up_range()
        setattr(reader.module, reader.tensor, parameter)
        for other in reader.module.parameters(recurse=False):
            _part(other, old)


def _part(tensor: Tensor, other: Tensor) -> None:
    """Give a tensor memory of its own, if it lies in that of another, as those of an RNN do."""
    if isinstance(tensor, PackedWeight) or tensor.device.type == "meta":
        return
    if tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        tensor.data = tensor.data.clone()
