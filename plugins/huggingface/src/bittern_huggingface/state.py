"""Saves and restores transformers models by their own files, beside our manifest.

A saved directory is what ``save_pretrained`` writes, and two files of ours: ``manifest.json`` says
what was done to the model, ``state.safetensors`` holds what the quantizers found out. transformers
reads the plain model from it and does not look at ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.checkpoint import restore_state
from bittern.checkpoint.tensors import own_names, own_tensors
from bittern.convert import plain_name
from bittern.errors import CheckpointError
from bittern.modes import ModeContext
from bittern.nn import original_class
from bittern.reading import load_tensors
from bittern.records import CheckpointIO
from bittern.toolkit import default_toolkit
from bittern_huggingface.companions import copy_companions

__all__ = ["BESIDE", "TENSORS", "checkpoint_io", "inner_model", "restore_loaded", "state_of"]

NAME = "transformers"
TENSORS = "state.safetensors"
BESIDE = "bittern"  # where a directory of somebody else's keeps the state of its quantizers


def checkpoint_io(model: nn.Module) -> CheckpointIO | None:
    """Return what saves and loads ``model``; ``None`` where transformers' own files cannot hold it.

    They hold plain tensors under the names of the architecture: no packed weights, no shards of
    them, no adapters. Core's own file holds those.

    Args:
        model: A transformers model, or what wraps it.
    """
    inner = inner_model(model)
    if inner is None or has_adapters(inner):
        return None
    tensors = own_tensors(inner).values()
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    return CheckpointIO(name=NAME, save=save, load=load)


def inner_model(model: nn.Module) -> PreTrainedModel | None:
    """Return the transformers model that ``model`` is, or that DDP, peft and others wrap."""
    wrapped = (m for name, m in model.named_modules() if not plain_name(name))
    return next((m for m in wrapped if isinstance(m, PreTrainedModel)), None)


def has_adapters(model: nn.Module) -> bool:
    """Whether peft put adapters into a model."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and any(isinstance(m, layers.BaseTunerLayer) for m in model.modules())


def save(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write what ``save_pretrained`` writes, the tokenizer, and the quantizers' tensors.

    Args:
        model: A transformers model, or what wraps it.
        tensors: What the quantizers found out, by name.
        path: An empty directory.
    """
    inner = inner_model(model)
    assert inner is not None
    own = own_tensors(inner)
    inner.save_pretrained(path, state_dict=own)
    cls = original_class(inner)
    if inner.config.architectures != [cls.__name__]:  # the model itself was converted
        inner.config.architectures = [cls.__name__]
        inner.config.save_pretrained(path)
    copy_companions(inner, path)
    save_file(dict(tensors), path / TENSORS)


def load(model: nn.Module, path: Path) -> Mapping[str, Tensor]:
    """Fill a model from what `save` wrote, and return the quantizers' tensors.

    transformers builds a second model from the files, since names and layouts on disk are its own
    affair; its tensors are copied into ``model``, in the dtypes that this one has.

    Raises:
        CheckpointError: The files are damaged, or of another model.
    """
    inner = inner_model(model)
    assert inner is not None
    quantizers = _quantizers(path)
    own = own_tensors(inner)
    if any(tensor.device.type == "meta" for tensor in own.values()):
        raise CheckpointError(
            "weights of the model are offloaded, and nothing can be loaded into those",
            where=str(path),
            hint="bittern.load(path) gives the quantized model; or restore before offloading",
        )
    twin = _twin(inner, path)
    found = own_tensors(twin)
    for name, tensor in found.items():
        if name not in own or own[name].shape != tensor.shape:
            _refuse(f"{name} does not fit", path)
    names = own_names(model)
    model.load_state_dict({names.live(name): t for name, t in found.items()}, strict=False)
    return quantizers


def state_of(path: Path) -> Path | None:
    """Return the directory with the saved state of the checkpoint ``path``, if it has one."""
    places = (path, path / BESIDE)
    return next((place for place in places if (place / "manifest.json").is_file()), None)


def restore_loaded(model: nn.Module, state: Path) -> None:
    """Quantize a model as a saved one was that has its weights already.

    Args:
        model: What transformers loaded from the directory.
        state: What `state_of` found in it.

    Raises:
        CheckpointError: The state is damaged, needs a plugin that is missing, or is of another
            model.
    """
    io = CheckpointIO(name=NAME, save=save, load=lambda _, path: _quantizers(path))
    restore_state(model, state, ModeContext(toolkit=default_toolkit()), resolve_io=lambda: io)


def _quantizers(path: Path) -> dict[str, Tensor]:
    return load_tensors(path / TENSORS, error=CheckpointError, within=path)


def _twin(model: PreTrainedModel, path: Path) -> nn.Module:
    """Return an unquantized model with the weights of ``path``, on the CPU."""
    cls: Any = original_class(model)
    try:
        found, info = cls.from_pretrained(
            path,
            config=model.config,
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
    for kind in ("missing", "unexpected", "mismatched"):
        if problems := sorted(map(str, info[f"{kind}_keys"])):
            _refuse(f"{len(problems)} {kind} weights: {', '.join(problems[:3])}", path)
    return found  # type: ignore[no-any-return]


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
