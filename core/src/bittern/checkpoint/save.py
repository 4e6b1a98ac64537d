"""Saves what was done to a model: its tensors, its quantizers' state, and the manifest."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from bittern._version import __version__
from bittern.checkpoint.checksums import tensor_checksums
from bittern.checkpoint.manifest import FILE, TENSORS, Manifest, ModeEntry
from bittern.checkpoint.tensors import own_names, own_tensors, quantizer_tensors, unaliased
from bittern.checkpoint.witness import witness
from bittern.errors import CheckpointError, PlanError
from bittern.exporting import staged_directory
from bittern.modes import recorded
from bittern.records import AppliedMode, CheckpointIO, Mode
from bittern.registry import NamedTable

__all__ = ["replaceable", "save_state"]


def save_state(
    model: nn.Module,
    path: Path,
    *,
    modes: NamedTable[Mode],
    io: CheckpointIO | None = None,
    state_only: bool = False,
    replace: bool = False,
) -> None:
    """Write a model to the directory ``path``, whole or not at all.

    Args:
        model: A model with at least one mode, or what wraps it.
        path: The directory.
        modes: What the plugins registered.
        io: Writes the model's own tensors; ``None`` for safetensors.
        state_only: Whether the model's own tensors are left to somebody else.
        replace: Whether a state that is there already is replaced. At every instant the directory
            is the whole old or the whole new one, whatever kills the process.

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
    with staged_directory(path, replace=replaceable if replace else None) as stage:
        checksums: dict[str, int] = {}
        if io is None or state_only:
            save_file(tensors, stage / TENSORS)
            checksums = tensor_checksums(tensors)
        else:
            io.save(model, tensors, stage)
        Manifest(
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
            checksums=checksums,
            files=_files(stage),
        ).write(stage)


def replaceable(path: Path) -> bool:
    """Whether a directory holds a saved state and nothing else, so that another may replace it."""
    try:
        manifest = Manifest.read(path)
    except CheckpointError:
        return False
    return set(_files(path)) <= {FILE, *manifest.files}


def _files(directory: Path) -> list[str]:
    found = (p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(directory).as_posix() for p in found)


def _plugins(stack: list[AppliedMode]) -> dict[str, str]:
    """Return name and version of the plugins that are needed to replay a stack."""
    labels = {mode.plugin for mode in stack}
    for mode in stack:
        entries = mode.metadata.get("entries", ())
        if isinstance(entries, list):
            labels |= {str(e["plugin"]) for e in entries if isinstance(e, dict) and "plugin" in e}
    pairs = (label.partition(" ") for label in sorted(labels))
    return {name: version for name, _, version in pairs if name != "bittern"}
