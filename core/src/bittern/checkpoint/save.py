"""Saves what was done to a model: its tensors, its quantizers' state, and the manifest."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from bittern._version import __version__
from bittern.checkpoint.manifest import Manifest, ModeEntry
from bittern.checkpoint.tensors import own_names, own_tensors, quantizer_tensors, unaliased
from bittern.checkpoint.witness import witness
from bittern.errors import PlanError
from bittern.exporting import staged_directory
from bittern.modes import recorded
from bittern.records import AppliedMode, CheckpointIO, Mode
from bittern.registry import NamedTable

__all__ = ["TENSORS", "save_state"]

TENSORS = "state.safetensors"


def save_state(
    model: nn.Module,
    path: Path,
    *,
    modes: NamedTable[Mode],
    io: CheckpointIO | None = None,
    state_only: bool = False,
) -> None:
    """Write a model to the directory ``path``, whole or not at all.

    Args:
        model: A model with at least one mode, or what wraps it.
        path: The directory.
        modes: What the plugins registered.
        io: Writes the model's own tensors; ``None`` for safetensors.
        state_only: Whether the model's own tensors are left to somebody else.

    Raises:
        PlanError: Nothing was done to the model.
        OutputError: The directory cannot be used.
    """
    stack = recorded(model, modes)
    if not stack:
        raise PlanError(
            "this model is not quantized, and no other mode was applied to it",
            hint="call bittern.quantize(model, recipe) first",
        )
    tensors = quantizer_tensors(model)
    aliases: dict[str, str] = {}
    if state_only:
        tensors |= witness(model)
    elif io is None:
        names = own_names(model)
        own = {names.saved(name): tensor for name, tensor in own_tensors(model).items()}
        kept, aliases = unaliased(own)
        tensors |= kept
    manifest = Manifest(
        bittern=__version__,
        plugins=_plugins(stack),
        modes=[
            ModeEntry(
                name=m.name, plugin=m.plugin, config=dict(m.config), metadata=dict(m.metadata)
            )
            for m in stack
        ],
        io="safetensors" if io is None or state_only else io.name,
        weights=not state_only,
        aliases=aliases,
    )
    with staged_directory(path) as stage:
        if io is None or state_only:
            save_file(tensors, stage / TENSORS)
        else:
            io.save(model, tensors, stage)
        manifest.write(stage)


def _plugins(stack: list[AppliedMode]) -> dict[str, str]:
    """Return name and version of the plugins that are needed to replay a stack."""
    labels = {mode.plugin for mode in stack}
    for mode in stack:
        entries = mode.metadata.get("entries", ())
        if isinstance(entries, list):
            labels |= {str(e["plugin"]) for e in entries if isinstance(e, dict) and "plugin" in e}
    pairs = (label.partition(" ") for label in sorted(labels))
    return {name: version for name, _, version in pairs if name != "bittern"}
