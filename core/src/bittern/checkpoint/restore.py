"""Restores a saved state into a fresh model: the same classes, quantizers and bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bittern.checkpoint.checksums import check_file
from bittern.checkpoint.manifest import DCP, SHARDS, TENSORS, Manifest
from bittern.checkpoint.tensors import (
    QUANTIZERS,
    aliases_in,
    load_quantizers,
    own_tensors,
    split,
)
from bittern.checkpoint.witness import WITNESS, check_witness
from bittern.convert import LiveNames, remember, revert, unwrapped
from bittern.errors import BitternError, CheckpointError
from bittern.modes import ModeContext, replay
from bittern.nn.quantizer import LEARNED
from bittern.reading import load_tensors
from bittern.records import AppliedMode, CheckpointIO
from bittern.runtime.access import is_sharded, shard_like
from bittern.runtime.ranks import agree

__all__ = ["restore_state"]


def restore_state(
    model: nn.Module,
    path: Path,
    context: ModeContext,
    *,
    resolve_io: Callable[[], CheckpointIO | None] = lambda: None,
) -> None:
    """Do to ``model`` what was done to the saved one, and load its tensors.

    Args:
        model: A model of the saved one's architecture, quantized or not, or what wraps it. If it
            is in shards (FSDP2), every rank calls this.
        path: What `save_state` wrote.
        context: What the modes are given.
        resolve_io: Asks the plugins who loads the model's own tensors.

    Raises:
        CheckpointError: The state is damaged, needs a plugin that is missing, or does not fit the
            model; the model is then what it was.
    """
    manifest = Manifest.read(path)
    where = str(path)
    io = _io(manifest, resolve_io, where)
    tensors: dict[str, Tensor] = {}
    if io is None:
        tensors = load_tensors(path / TENSORS, error=CheckpointError, within=path)
        if TENSORS in manifest.checksums:
            check_file(path / TENSORS, manifest.checksums[TENSORS])
    else:
        _check_files(path, manifest)
    stack = [
        AppliedMode(name=m.name, plugin=m.plugin, config=m.config, metadata=m.metadata)
        for m in manifest.modes
    ]
    own, quantizers = split({n: t for n, t in tensors.items() if not n.startswith(WITNESS)})
    own |= {name: own[kept] for name, kept in manifest.aliases.items() if kept in own}
    wrapper, model = model, unwrapped(model)
    undo = remember(model)
    try:
        revert(model)
        if not manifest.weights:
            samples = {n: t for n, t in tensors.items() if n.startswith(WITNESS)}
            check_witness(model, samples, where=where)
        later = replay(model, stack, context)
        fill: Callable[[], object] | None = None
        if io is not None:
            found, fill = io.load(wrapper, path)
            quantizers = dict(found)
        elif manifest.io == DCP:
            fill = _from_shards(model, path, manifest)
        elif manifest.weights:
            live = own_tensors(model)
            own = _fitting(live, LiveNames(model, live), own, where=where)
            own = {name: shard_like(tensor, live[name]) for name, tensor in own.items()}
            fill = partial(model.load_state_dict, own, strict=False)
        _check_learned(model, quantizers)
        load_quantizers(model, quantizers)
        if fill is not None:  # last, since what it writes into the model's tensors stays written
            fill()
        for finish in later:
            finish()
    except Exception as error:  # a plan that nobody made can fail anywhere
        undo()
        if isinstance(error, MemoryError):
            raise
        if isinstance(error, CheckpointError):
            raise CheckpointError(
                error.what if error.where in (None, where) else str(error).split("\n")[0],
                where=where,
                hint=error.hint,
            ) from error
        what = str(error) if isinstance(error, BitternError | RuntimeError) else repr(error)
        raise CheckpointError(
            f"it does not fit this model: {what}",
            where=where,
            hint="restore into a model of the same architecture, with the versions that "
            "`bittern inspect` names",
        ) from error
    except BaseException:
        undo()
        raise


def _io(
    manifest: Manifest, resolve_io: Callable[[], CheckpointIO | None], where: str
) -> CheckpointIO | None:
    if manifest.io in ("safetensors", DCP):
        return None
    found = resolve_io()
    if found is None or found.name != manifest.io:
        raise CheckpointError(
            f"its tensors were written by {manifest.io!r}, and no loaded plugin reads that for "
            "this model",
            where=where,
            hint=f"it was saved with {', '.join(manifest.plugins) or 'a plugin'}",
        )
    return found


def _check_files(path: Path, manifest: Manifest) -> None:
    """Raise if a file that a plugin reads changed; whether one is missing, only the plugin knows.

    Others than those that were saved are let through: weights may have been split since.
    """
    for file in sorted(path.glob("*.safetensors")):
        if file.name in manifest.checksums and file.is_file():
            check_file(file, manifest.checksums[file.name])


def _from_shards(model: nn.Module, path: Path, manifest: Manifest) -> Callable[[], None]:
    """Check shards, and return a function that fills the tensors of a model from them."""
    from bittern.checkpoint.sharded import check_shards, load_shards, shard_shapes

    folder, aliases = path / SHARDS, manifest.aliases
    together = any(map(is_sharded, model.parameters()))
    live = own_tensors(model)
    names = LiveNames(model, live)
    problem: Exception | None = None
    try:
        there = shard_shapes(folder)
        check_shards(path, manifest.checksums, together=together)
        there |= {name: there[kept] for name, kept in aliases.items() if kept in there}
        _fitting(live, names, there, where=str(path))
    except CheckpointError as error:
        problem = error
    if together:
        agree(problem, failure=CheckpointError)  # before anybody waits for the others
    elif problem is not None:
        raise problem
    own = {names.saved(name): tensor.detach() for name, tensor in live.items()}

    def fill() -> None:
        load_shards({name: tensor for name, tensor in own.items() if name not in aliases}, folder)
        with torch.no_grad():
            for name, kept in aliases.items():  # where the model ties them, it has them already
                own[name].copy_(own[kept])
        model.load_state_dict({names.live(name): t for name, t in own.items()}, strict=False)

    return fill


def _check_learned(model: nn.Module, quantizers: Mapping[str, Tensor]) -> None:
    """Refuse to put learned ranges into a model that was sharded without them."""
    learned = next((name for name in quantizers if name.endswith(f"/{LEARNED}")), None)
    if learned is not None and any(map(is_sharded, model.parameters())):
        raise CheckpointError(
            f"{learned.removeprefix(QUANTIZERS).removesuffix(f'/{LEARNED}')} has a learned range, "
            "a parameter that the shards of this model have no place for",
            hint="restore into the plain model, and shard it afterwards",
        )


def _fitting(
    own: Mapping[str, Tensor], names: LiveNames, saved: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """Compare names and shapes before anything is loaded, and return the tensors by live name."""
    for name, tensor in own.items():
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"{name} is on the meta device, and nothing can be loaded into it",
                where=where,
                hint='call model.to_empty(device="cpu") first, and fill what is in no state_dict',
            )
    tensors = {names.live(name): tensor for name, tensor in saved.items()}
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is not in the model" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensor.shape)} here and {tuple(tensors[name].shape)} there"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems += [
        f"{name} and {first} are one tensor here and two there"
        for name, first in aliases_in(own).items()
        if name in tensors and first in tensors and not _same(tensors[name], tensors[first])
    ]
    problems += [
        f"{name} is {tensor.dtype} here and {tensors[name].dtype} there"
        for name, tensor in own.items()
        if name in tensors and _kind(tensors[name]) != _kind(tensor)
    ]
    if problems:
        raise CheckpointError(
            f"it is the state of another model: {'; '.join(problems[:3])}",
            where=where,
            hint="restore into a model of the same architecture",
        )
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two saved tensors are one, or hold the same; those in shards are not looked into."""
    if one is other or "meta" in (one.device.type, other.device.type):
        return True
    return torch.equal(one, other)


def _kind(tensor: Tensor) -> str | torch.dtype:
    """Return what a tensor may be converted within: another precision is no other weight."""
    return "float" if tensor.is_floating_point() else tensor.dtype
