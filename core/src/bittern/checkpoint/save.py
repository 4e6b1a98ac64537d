"""Saves a quantized model: its tensors, its quantizers' ranges, and the manifest."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from bittern._version import __version__
from bittern.checkpoint.manifest import TENSORS, Manifest, entries_of
from bittern.convert import plan_of
from bittern.exporting import staged_directory
from bittern.nn import named_quantizers, quantizer_keys

__all__ = ["QUANTIZERS", "save_state"]

QUANTIZERS = "bittern.quantizers/"  # then "module.slot/" and the name of what it found out


def save_state(model: nn.Module, path: Path) -> None:
    """Write ``model`` to the directory ``path``, whole or not at all.

    Raises:
        PlanError: The model is not quantized.
        OutputError: The directory cannot be used.
    """
    plan = plan_of(model)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    learned = quantizer_keys(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or name in learned:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    for name, quantizer in named_quantizers(model):
        for local, value in quantizer.state().items():
            tensors[f"{QUANTIZERS}{name}/{local}"] = value.cpu().contiguous()
    labels = {entry.plugin for entry in plan.entries} - {"bittern"}
    manifest = Manifest(
        bittern=__version__,
        recipe=plan.recipe,
        entries=entries_of(plan),
        algorithm=[[name, dict(options)] for name, options in plan.algorithm],
        plugins={label.partition(" ")[0]: label.partition(" ")[2] for label in sorted(labels)},
        aliases=aliases,
    )
    with staged_directory(path) as stage:
        save_file(tensors, stage / TENSORS)
        manifest.write(stage)
