"""Saves what was done to a model: its tensors, its quantizers' state, and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from bittern._version import __version__
from bittern.checkpoint.checksums import file_checksum
from bittern.checkpoint.manifest import DCP, FILE, SHARDS, TENSORS, Manifest, ModeEntry
from bittern.checkpoint.stage import shared_stage
from bittern.checkpoint.tensors import (
    aliases_in,
    apart,
    check_tensors,
    own_names,
    own_tensors,
    quantizer_tensors,
)
from bittern.checkpoint.witness import witness
from bittern.convert import unwrapped
from bittern.errors import CheckpointError, PlanError
from bittern.modes import recorded
from bittern.records import AppliedMode, CheckpointIO, Mode
from bittern.registry import NamedTable
from bittern.runtime.access import is_sharded
from bittern.runtime.ondisk import places_of
from bittern.runtime.ranks import agree, is_first

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

    In several processes every rank calls this: rank 0 writes, and of a model in shards (FSDP2) each
    rank its own; an error on one rank is one on all.

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
        CheckpointError: Weights lie on the disk; or, in several processes: one of them failed, and
            says why.
    """
    if places_of(model) and not state_only:
        raise CheckpointError(
            "weights of this model lie on the disk, and a state holds all of them",
            hint="export it; or state_only=True, beside weights that calibration did not change",
        )
    problem: Exception | None = None
    content: _Content | None = None
    try:
        content = _collect(model, modes, own=io is None and not state_only, witnesses=state_only)
    except Exception as error:
        problem = error
    aliases = agree(problem, content and content.aliases, failure=CheckpointError)[0]
    assert content is not None
    own = {name: tensor for name, tensor in content.own.items() if name not in aliases}
    shards = {}
    if any(map(is_sharded, own.values())):
        shards, own = own, {}
    with shared_stage(path, replace=replaceable if replace else None) as stage:
        checksums: dict[str, int] = {}
        if shards:
            from bittern.checkpoint.sharded import save_shards

            checksums |= save_shards(shards, stage / SHARDS)
        if io is not None and not state_only:
            io.save(model, content.quantizers, stage)
            if is_first():  # files in folders are the framework's affair, as are those of ranks
                checksums |= {f.name: file_checksum(f) for f in stage.glob("*.safetensors")}
        elif is_first():
            save_file(content.quantizers | apart(own), stage / TENSORS)
            checksums[TENSORS] = file_checksum(stage / TENSORS)
        if is_first():
            name = "safetensors" if io is None or state_only else io.name
            Manifest(
                bittern=__version__,
                plugins=_plugins(content.stack),
                modes=[
                    ModeEntry(
                        name=m.name,
                        plugin=m.plugin,
                        config=dict(m.config),
                        metadata=dict(m.metadata),
                    )
                    for m in content.stack
                ],
                io=DCP if shards else name,
                weights=not state_only,
                aliases=aliases,
                checksums=checksums,
                files=_files(stage),
            ).write(stage)


@dataclass(frozen=True)
class _Content:
    """What is to be written.

    Attributes:
        stack: The modes.
        quantizers: What the quantizers found out, and what else is of our making.
        own: The model's own tensors.
        aliases: Which of those share storage with which.
    """

    stack: list[AppliedMode]
    quantizers: dict[str, Tensor]
    own: dict[str, Tensor]
    aliases: dict[str, str]


def _collect(model: nn.Module, modes: NamedTable[Mode], *, own: bool, witnesses: bool) -> _Content:
    stack = recorded(model, modes)
    if not stack:
        raise PlanError(
            "this model is not quantized, and no other mode was applied to it",
            hint="call bittern.quantize(model, recipe) first",
        )
    if not witnesses:
        check_tensors(model)
    model = unwrapped(model)
    quantizers = quantizer_tensors(model)
    if witnesses:
        quantizers |= witness(model)
    if not own:
        return _Content(stack, quantizers, {}, {})
    names = own_names(model)
    tensors = {names.saved(name): tensor.detach() for name, tensor in own_tensors(model).items()}
    return _Content(stack, quantizers, tensors, aliases_in(tensors))


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
