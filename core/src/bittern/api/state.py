"""The modes of a model, and its saved state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.toolkit import Toolkit, toolkit_or_default

if TYPE_CHECKING:
    from torch import nn

    from bittern.records import AppliedMode, DataConfig
    from bittern.runtime import Data, Progress

__all__ = ["apply_mode", "compress", "fold", "modes_of", "restore", "save", "unfold"]


def apply_mode(
    model: nn.Module,
    mode: str,
    config: Mapping[str, Any] | None = None,
    *,
    data: Data | str | Path | None = None,
    data_config: DataConfig | None = None,
    progress: Progress | None = None,
    toolkit: Toolkit | None = None,
) -> AppliedMode:
    """Apply an optimization step to a model, in place, and put it on the model's stack of modes.

    Args:
        model: Any PyTorch model.
        mode: Name of the mode: ``quantize``, ``fold``, ``compress``, or a plugin's.
        config: Its options.
        data: As for `quantize`, for modes that need data.
        data_config: How a path is read.
        progress: Shows where long work is.
        toolkit: Plugins to use; all that are installed by default.

    Returns:
        The mode as it is on the stack.

    Raises:
        PlanError: No such mode or option, or it may not follow the modes that were applied; the
            structure of the model is then what it was.
    """
    return toolkit_or_default(toolkit).apply_mode(
        model, mode, config, data=data, data_config=data_config, progress=progress
    )


def modes_of(model: nn.Module) -> tuple[AppliedMode, ...]:
    """Return what was done to a model, the first step first.

    Args:
        model: A model, a copy of it, or what wraps it (DDP, ``torch.compile``, peft).
    """
    from bittern.convert import modes_of

    return modes_of(model)


def fold(model: nn.Module, *, keep: bool = False, toolkit: Toolkit | None = None) -> AppliedMode:
    """Write into the weights of a model what their quantizers make of them, in place.

    Outputs stay the same, bit for bit; the quantizers of activations stay too.

    Args:
        model: A quantized and calibrated model.
        keep: Whether the original weights are kept, on the CPU, for `unfold` and `revert`.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        PlanError: There is no weight to fold.
    """
    return toolkit_or_default(toolkit).apply_mode(model, "fold", {"keep": keep})


def unfold(model: nn.Module) -> None:
    """Give folded weights back the numbers they had, in place.

    Args:
        model: A model that `fold` folded with ``keep=True``, in this process.

    Raises:
        PlanError: The model is not folded.
        ModelError: The originals were not kept; nothing is changed then.
    """
    from bittern.modes.fold import unfold as undo

    undo(model)


def compress(model: nn.Module, *, toolkit: Toolkit | None = None) -> AppliedMode:
    """Hold the quantized weights of a model as codes and scales, in place: memory is really freed.

    Outputs stay the same, bit for bit. The weights are frozen; what they were before they were
    rounded is gone, so `revert` gives the rounded values.

    Args:
        model: A quantized and calibrated model.
        toolkit: Plugins to use; all that are installed by default.

    Returns:
        The mode on the stack; its metadata name the weights that are packed, and those that are
        ``left`` as they were, with the reason.

    Raises:
        PlanError: There is no weight to pack.
    """
    return toolkit_or_default(toolkit).apply_mode(model, "compress")


def save(
    model: nn.Module,
    path: str | Path,
    *,
    state_only: bool = False,
    overwrite: bool = False,
    toolkit: Toolkit | None = None,
) -> None:
    """Save a quantized model: weights, ranges and a manifest of what was done. Never pickle.

    Args:
        model: A quantized model, or what wraps it.
        path: A directory that is empty or not there.
        state_only: Whether only the quantizers' state is saved, beside weights that somebody else
            keeps.
        overwrite: Whether a saved state that is there already is replaced; at every instant the
            directory is then the whole old or the whole new one.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        PlanError: No mode was applied to the model.
        OutputError: The directory cannot be used.
        CheckpointError: In several processes: one of them failed, and says why.
    """
    toolkit_or_default(toolkit).save(model, path, state_only=state_only, overwrite=overwrite)


def restore(model: nn.Module, path: str | Path, *, toolkit: Toolkit | None = None) -> None:
    """Quantize a fresh model as a saved one was, in place, with bit-identical outputs.

    Args:
        model: A model of the saved one's architecture.
        path: What `save` wrote.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        CheckpointError: The state is damaged, needs a plugin that is missing, or does not fit the
            model; the model is then what it was. Only what a plugin does after the weights were
            loaded leaves those loaded, if it fails.
    """
    toolkit_or_default(toolkit).restore(model, path)
