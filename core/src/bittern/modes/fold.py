"""The mode ``fold``: weights hold what their quantizers make of them, until they are unfolded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bittern.convert import LiveNames, drop_modes, modes_of
from bittern.errors import PlanError
from bittern.modes.context import ModeContext
from bittern.modes.names import readers_named
from bittern.nn.folding import fold_all, unfold_all

__all__ = ["NAME", "FoldConfig", "convert", "restore", "unfold"]

NAME = "fold"


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """Options of the mode ``fold``.

    Attributes:
        keep: Whether to keep the original weights, on the CPU, for `unfold`. They live in this
            process only: a saved state does not hold them.
    """

    keep: bool = False


def convert(model: nn.Module, config: FoldConfig, context: ModeContext) -> dict[str, Any]:
    """Fold the weights of a quantized model; outputs stay the same, bit for bit.

    Raises:
        PlanError: There is no weight to fold.
    """
    names, left = fold_all(model, keep=config.keep)
    if not names:
        why = next((f"{name}: {reason}" for name, reason in left.items()), None)
        raise PlanError(
            "there is no weight to fold",
            hint=why or "call bittern.quantize(model, recipe) first",
        )
    saved = LiveNames(model).saved
    return {
        "folded": [saved(name) for name in names],
        "left": {saved(name): why for name, why in left.items()},
    }


def restore(
    model: nn.Module, config: FoldConfig, metadata: Mapping[str, Any], context: ModeContext
) -> None:
    """Tell the quantizers of a converted model that the weights to be loaded are folded.

    Raises:
        CheckpointError: The metadata is malformed, or of another model.
    """
    for reader in readers_named(model, metadata.get("folded"), what="folded"):
        reader.quantizer.folded = True


def unfold(model: nn.Module) -> None:
    """Give folded weights back the numbers they had, and take ``fold`` off the stack.

    Args:
        model: A model that was folded with ``keep=True``, in this process.

    Raises:
        PlanError: The model is not folded.
        ModelError: The originals were not kept; nothing is changed then.
    """
    if NAME not in {mode.name for mode in modes_of(model)}:
        raise PlanError(
            "this model is not folded", hint="call bittern.fold(model, keep=True) first"
        )
    unfold_all(model)
    drop_modes(model, frozenset({NAME}))
