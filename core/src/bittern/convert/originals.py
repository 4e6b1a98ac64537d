"""Plain weights for a model that is reverted: folded ones unfolded, packed ones unpacked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bittern.nn import TensorQuantizer
from bittern.nn.folding import folded_readers, unfold
from bittern.nn.packed import PackedWeight
from bittern.nn.weights import readers_of

__all__ = ["folded_data", "plain_weights"]


def plain_weights(model: nn.Module) -> None:
    """Make plain parameters of all weights, as the model needs them without its quantizers.

    A folded weight gets its original numbers back where they were kept, else it keeps the rounded
    ones; so does a weight that was packed, in a new parameter that is frozen or not as the one
    before it. Rotations and pre-scales of the weight are undone, since those of its input go.
    """
    done: set[int] = set()
    for reader in folded_readers(model):
        parameter, quantizer = reader.module._parameters[reader.tensor], reader.quantizer
        assert parameter is not None
        if quantizer.kept is not None:
            unfold(reader)
        elif id(parameter) not in done:
            parameter.data = _undone(quantizer, parameter.data)
            done.add(id(parameter))
        quantizer.folded = False
    made: dict[int, nn.Parameter] = {}
    for reader in readers_of(model):
        packed, quantizer = reader.module._parameters.get(reader.tensor), reader.quantizer
        if not isinstance(packed, PackedWeight):
            continue
        if id(packed) not in made:
            with torch.inference_mode(False), torch.no_grad():
                value = _undone(quantizer, quantizer(packed))
            made[id(packed)] = nn.Parameter(value, requires_grad=quantizer.was_trained)
        setattr(reader.module, reader.tensor, made[id(packed)])


def folded_data(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives folded parameters the data back that they hold now."""
    parameters = [r.module._parameters[r.tensor] for r in folded_readers(model)]
    before = [(p, p.data) for p in parameters if p is not None]

    def undo() -> None:
        for parameter, data in before:
            parameter.data = data

    return undo


@torch.no_grad()
def _undone(quantizer: TensorQuantizer, value: Tensor) -> Tensor:
    transforms = quantizer.transforms
    return value if transforms is None else transforms.undone(value)
