"""Makes a model whose large weights stay in the checkpoint's files until a block needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bittern.errors import ModelError
from bittern.reading import read_json, tensor_headers
from bittern.runtime.ondisk import Place, move_to_disk
from bittern_huggingface.adapter import make_adapter

__all__ = ["make_on_disk"]

_SMALL = 2**16  # elements: norms and biases stay in memory
_HINT = "load it without device='disk'"


def make_on_disk(cls: Any, settings: Any, path: Path, *, dtype: Any) -> nn.Module:
    """Return the model of a checkpoint directory, the large weights of its blocks on the disk.

    Args:
        cls: The model's class, or an Auto class.
        settings: Its config.
        path: A directory with safetensors files.
        dtype: Of floating tensors in memory; ``"auto"`` for the checkpoint's own.

    Raises:
        ModelError: accelerate is missing; the directory has no safetensors files; or its tensors
            are not, one by one, those of the model, so that transformers has to convert them.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ModelError(
            "models on the disk need accelerate",
            hint="pip install 'bittern-huggingface[disk]'",
        ) from error
    dtype = settings.dtype if dtype == "auto" else dtype
    make = getattr(cls, "from_config", None) or cls._from_config  # of Auto classes, of models
    with init_empty_weights(include_buffers=False):
        model = make(settings, dtype=dtype)
    model.tie_weights()
    adapter = make_adapter(model)
    blocks = () if adapter is None else adapter.blocks
    places = _places(path)
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name not in places]
    if missing or not blocks:
        what = f"{missing[0]} is not in its files" if missing else "its blocks are not known"
        raise ModelError(f"it cannot be read block by block: {what}", where=str(path), hint=_HINT)
    stays: dict[str, Place] = {}
    for name, parameter in parameters.items():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if inside and parameter.numel() > _SMALL:
            stays[name] = places[name]
        elif name in places:
            _fill(model, name, places[name])
    for name, _ in model.named_buffers():
        if name in places:
            module, _, local = name.rpartition(".")
            owner = model.get_submodule(module)
            owner._buffers[local] = places[name].load(owner._buffers[local].dtype)
    model.tie_weights()
    move_to_disk(model, blocks, stays)
    return model  # type: ignore[no-any-return]


def _fill(model: nn.Module, name: str, place: Place) -> None:
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    meta = module._parameters[local]
    assert meta is not None
    tensor = place.load(meta.dtype)
    if tensor.shape != meta.shape:
        raise ModelError(
            f"{name} is {tuple(tensor.shape)} in the file and {tuple(meta.shape)} by config.json",
            where=str(place.path),
            hint="the checkpoint is damaged, or belongs to another config.json",
        )
    module._parameters[local] = nn.Parameter(tensor.clone(), requires_grad=meta.requires_grad)


def _places(path: Path) -> dict[str, Place]:
    """Return where every tensor of a checkpoint lies."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index, error=ModelError, strict=False)["weight_map"]
        files = sorted({path / file for file in listed.values()})
    else:
        files = [path / "model.safetensors"]
    found: dict[str, Place] = {}
    for file in files:
        for header in tensor_headers(file, error=ModelError, within=path):
            found[header.name] = Place(file, header.name)
    return found
