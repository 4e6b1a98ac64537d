"""Folding: a weight holds what its quantizer makes of it, and the quantizer does nothing.

Rotation, pre-scale and a second quantizer of the weight are in the result as well. The parameter
stays the same object; only its data is another tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bittern.errors import ModelError
from bittern.nn.weights import Reader, SharedWeight, quantized_weights, readers_of

__all__ = ["Fold", "fold_all", "folded_readers", "prepare_folds", "unfold", "unfold_all"]


@dataclass(frozen=True, eq=False)
class Fold:
    """A weight that can be folded and unfolded without computing anything.

    Attributes:
        weight: The weight.
        original: Its data.
        rounded: What takes its place.
    """

    weight: SharedWeight
    original: Tensor
    rounded: Tensor

    def on(self) -> None:
        """Fold it."""
        self._set(self.rounded, folded=True)

    def off(self) -> None:
        """Unfold it, bit for bit."""
        self._set(self.original, folded=False)

    def _set(self, data: Tensor, *, folded: bool) -> None:
        self.weight.parameter.data = data
        for quantizer in self.weight.quantizers:
            quantizer.folded = folded
            quantizer.clear_cache()


def prepare_folds(model: nn.Module) -> tuple[list[Fold], dict[str, str]]:
    """Return a fold of every weight that can be folded; nothing is changed yet.

    Args:
        model: A quantized model.

    Returns:
        The folds, and the names of quantized weights that cannot be folded, with the reason.
    """
    weights, left = quantized_weights(model)
    folds = []
    for weight in weights:
        rounded = weight.rounded()
        if rounded is not None:
            folds.append(Fold(weight, weight.parameter.data, rounded))
        else:
            left |= dict.fromkeys(weight.names, "its readers do not quantize it alike")
    return folds, left


def fold_all(model: nn.Module, *, keep: bool) -> tuple[list[str], dict[str, str]]:
    """Fold every weight that can be folded. Until the end, both copies are in memory.

    Args:
        model: A quantized model.
        keep: Whether quantizers keep the originals, on the CPU, for `unfold_all`.

    Returns:
        The names of the folded weights, and of those that are not, with the reason.
    """
    folds, left = prepare_folds(model)
    for fold in folds:
        fold.on()
        kept = fold.original.cpu() if keep else None
        for quantizer in fold.weight.quantizers:
            quantizer.kept = kept
    return [name for fold in folds for name in fold.weight.names], left


def unfold_all(model: nn.Module) -> None:
    """Give folded weights back the numbers they had, in the dtype and place they have now.

    Raises:
        ModelError: The originals were not kept; nothing is changed then.
    """
    readers = folded_readers(model)
    gone = [reader.name for reader in readers if reader.quantizer.kept is None]
    if gone:
        raise ModelError(
            f"the originals of {len(gone)} folded weights were not kept: {', '.join(gone[:3])}",
            hint="fold with keep=True, in the process that unfolds; or load the weights again",
        )
    for reader in readers:
        unfold(reader)


def unfold(reader: Reader) -> None:
    """Give one folded weight back the numbers that its quantizer kept."""
    parameter, quantizer = reader.module._parameters[reader.tensor], reader.quantizer
    assert parameter is not None
    assert quantizer.kept is not None
    parameter.data = quantizer.kept.to(parameter.device, parameter.dtype)
    quantizer.folded, quantizer.kept = False, None
    quantizer.clear_cache()


def folded_readers(model: nn.Module) -> list[Reader]:
    """Return everyone who reads a folded weight."""
    return [reader for reader in readers_of(model) if reader.quantizer.folded]
