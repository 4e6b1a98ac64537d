"""Saves and restores transformers models by their own files, beside our manifest.

A saved directory is what ``save_pretrained`` writes, and two files of ours: ``manifest.json`` says
what was done to the model, ``state.safetensors`` holds what the quantizers found out. transformers
reads the plain model from it and does not look at ours.

A model with packed weights has no plain ones that transformers could read. Then all its tensors are
in ``state.safetensors``, and only the config is beside it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.checkpoint import restore_state
from bittern.checkpoint.tensors import aliases_in, own_names, own_tensors, split
from bittern.convert import unwrapped
from bittern.errors import CheckpointError
from bittern.modes import ModeContext
from bittern.nn import QuantModule, original_class
from bittern.nn.packed import PackedWeight
from bittern.reading import load_tensors
from bittern.records import CheckpointIO
from bittern.runtime.ranks import is_first
from bittern.toolkit import Toolkit
from bittern_huggingface.companions import copy_companions

__all__ = [
    "BESIDE",
    "TENSORS",
    "checkpoint_io",
    "inner_model",
    "is_packed_state",
    "restore_loaded",
    "state_of",
]

NAME = "bittern-huggingface"
TENSORS = "state.safetensors"
BESIDE = "bittern"  # where a directory of somebody else's keeps the state of its quantizers


def checkpoint_io(model: nn.Module) -> CheckpointIO | None:
    """Return what saves and loads ``model``; ``None`` where transformers' own files cannot hold it.

    They hold whole tensors under the names of the architecture: no shards of them, no adapters.
    Core's own file holds those.

    Args:
        model: A transformers model, or what wraps it.
    """
    inner = inner_model(model)
    if inner is None or has_adapters(inner):
        return None
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in own_tensors(inner).values()):
        return None
    return CheckpointIO(name=NAME, save=save, load=load)


def inner_model(model: nn.Module) -> PreTrainedModel | None:
    """Return the transformers model that ``model`` is, or that DDP, peft and others wrap."""
    found = unwrapped(model)
    return found if isinstance(found, PreTrainedModel) else None


def has_adapters(model: nn.Module) -> bool:
    """Whether peft put adapters into a model."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and any(isinstance(m, layers.BaseTunerLayer) for m in model.modules())


def save(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write what ``save_pretrained`` writes, the tokenizer, and the quantizers' tensors.

    Of several processes the first one writes; all of them hold the same.

    Args:
        model: A transformers model, or what wraps it.
        tensors: What the quantizers found out, by name.
        path: An empty directory.
    """
    if not is_first():
        return
    inner = inner_model(model)
    assert inner is not None
    own, more = _named_tensors(inner), dict(tensors)
    if is_packed(inner):
        tied = aliases_in(own)
        more |= {name: t.cpu().contiguous() for name, t in own.items() if name not in tied}
    else:
        inner.save_pretrained(path, state_dict=own)
    if not (path / "config.json").exists() or isinstance(inner, QuantModule):
        _save_config(inner, path)
    copy_companions(inner, path)
    save_file(more, path / TENSORS)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's own tensors by the names that they have without wrappers of its parts."""
    names = own_names(model)
    return {names.saved(name): tensor for name, tensor in own_tensors(model).items()}


def is_packed(model: nn.Module) -> bool:
    """Whether a model has packed weights."""
    return any(isinstance(parameter, PackedWeight) for parameter in model.parameters())


def _save_config(model: Any, path: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [original_class(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(path)
    if model.can_generate():
        model.generation_config.save_pretrained(path)


def load(model: nn.Module, path: Path) -> tuple[Mapping[str, Tensor], Callable[[], object]]:
    """Read what `save` wrote: the quantizers' tensors, and a function that fills the model.

    transformers builds a second model from the files, since names and layouts on disk are its own
    affair; its tensors are copied into ``model``, in the dtypes that this one has.

    Raises:
        CheckpointError: The files are damaged, or of another model.
    """
    inner = inner_model(model)
    assert inner is not None
    own, names = _named_tensors(inner), own_names(inner)
    if any(tensor.device.type == "meta" for tensor in own.values()):
        raise CheckpointError(
            "weights of the model are offloaded, and nothing can be loaded into those",
            where=str(path),
            hint="bittern.load(path) gives the quantized model; or restore before offloading",
        )
    found, quantizers = split(_ours(path))
    if not found:
        found = own_tensors(_twin(inner, path))
    for name, tensor in found.items():
        if name not in own or own[name].shape != tensor.shape:
            _refuse(f"{name} does not fit", path)
    loaded = {own[name].data_ptr() for name in found}
    missing = [name for name in own if name not in found and own[name].data_ptr() not in loaded]
    if missing:
        _refuse(f"{missing[0]} is missing", path)
    live = {names.live(name): tensor for name, tensor in found.items()}
    return quantizers, partial(inner.load_state_dict, live, strict=False)


def state_of(path: Path) -> Path | None:
    """Return the directory with the saved state of the checkpoint ``path``, if it has one."""
    places = (path, path / BESIDE)
    return next((place for place in places if (place / "manifest.json").is_file()), None)


def restore_loaded(model: nn.Module, state: Path, toolkit: Toolkit) -> None:
    """Quantize a model as a saved one was that has its weights already.

    Args:
        model: What transformers loaded from the directory.
        state: What `state_of` found in it.
        toolkit: The plugins.

    Raises:
        CheckpointError: The state is damaged, needs a plugin that is missing, or is of another
            model.
    """
    io = CheckpointIO(name=NAME, save=save, load=lambda _, path: (_ours(path), lambda: None))
    if is_packed_state(state):
        io = CheckpointIO(name=NAME, save=save, load=load)
    restore_state(model, state, ModeContext(toolkit=toolkit), resolve_io=lambda: io)


def is_packed_state(state: Path) -> bool:
    """Whether a saved directory holds the weights in our file, where transformers finds none."""
    return (
        not any(state.glob("model*.safetensors*"))
        and (state / "config.json").is_file()
        and (state / TENSORS).is_file()
    )


def _ours(path: Path) -> dict[str, Tensor]:
    return load_tensors(path / TENSORS, error=CheckpointError, within=path)


def _twin(model: PreTrainedModel, path: Path) -> nn.Module:
    """Return an unquantized model with the weights of ``path``, on the CPU."""
    cls: Any = original_class(model)
    try:
        saved = type(model.config).from_pretrained(path, local_files_only=True)
        found, info = cls.from_pretrained(
            path,
            config=model.config,
            attn_implementation="eager",  # it computes nothing
            dtype=reduce(torch.promote_types, _float_dtypes(model)),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # which gives their names; they are refused below
            local_files_only=True,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many kinds for damaged files
        line = str(error).strip().partition("\n")[0][:300]
        _refuse(f"transformers cannot load it: {line or type(error).__name__}", path, error)
    if _ties(model.config) and not _ties(saved):
        _refuse("its output layer has weights of its own, and the model ties them", path)
    for kind in ("missing", "unexpected", "mismatched"):
        if problems := sorted(map(str, info[f"{kind}_keys"])):
            _refuse(f"{len(problems)} {kind} weights: {', '.join(problems[:3])}", path)
    return found  # type: ignore[no-any-return]


def _ties(config: Any) -> bool:
    """Whether a config lets a model share the weights of its embedding and its output layer."""
    return bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))


def _float_dtypes(model: nn.Module) -> Iterator[torch.dtype]:
    """Yield the dtypes of a model's floats: the widest of them holds what any of them held."""
    for tensor in own_tensors(model).values():
        if tensor.is_floating_point():
            yield tensor.dtype


def _refuse(what: str, path: Path, cause: Exception | None = None) -> None:
    raise CheckpointError(
        what,
        where=str(path),
        hint="restore into a model of the same architecture; if it is, copy the files again",
    ) from cause
