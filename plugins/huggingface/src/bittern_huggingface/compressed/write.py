"""Writes a compressed-tensors checkpoint: packed tensors, config.json, tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from bittern.exporting import ExportContext, Written, checksum, checksums
from bittern.exporting.packed import PackedModule, packed_modules, plain_tensors
from bittern.numerics import Quantized, dequantize
from bittern.records import ExportReport
from bittern_huggingface.companions import copy_companions
from bittern_huggingface.compressed.cache import cache_tensors, is_attention
from bittern_huggingface.compressed.experts import are_experts, split_packed, split_plain
from bittern_huggingface.compressed.schemes import make_config, module_schemes

__all__ = ["write"]

NAME = "compressed-tensors"
SHARD = "5GB"


def write(model: nn.Module, path: Path, context: ExportContext) -> Written:
    """Write the checkpoint into the empty directory ``path``."""
    plan = context.plan
    schemes = module_schemes(plan, model)
    tensors = split_plain(model, plain_tensors(model, plan, dtype=context.adapter.dtype))
    simulated: dict[str, int] = {}
    packed = packed_modules(model, context.access)
    slots = plan.by_module()
    for item in context.progress.track(packed, "packing", total=len(slots)):
        if item.path not in slots:  # it was converted for its children's sake only
            continue
        if is_attention(slots[item.path]):
            tensors |= cache_tensors(item)
            continue
        scheme = schemes[item.path]
        apart = are_experts(slots[item.path])
        for part in split_packed(model, item) if apart else [item]:
            for name, tensor in _packed(part, scheme).items():
                tensors[f"{part.path}.{name}"] = tensor.detach().cpu()
            simulated[f"{part.path}.weight"] = checksum(_simulated(part.weights["weight"]))
    _save_shards(tensors, path)
    _save_config(model, path, make_config(plan, model), context.adapter.dtype)
    copy_companions(model, path)
    return Written(
        report=ExportReport(
            path=str(path), format=NAME, tensors=len(tensors), quantized=len(simulated)
        ),
        tensors=checksums(tensors),
        weights=simulated,
    )


def _simulated(weight: Quantized) -> Tensor:
    """Return what the model computed with, in float32: what a client must decode to."""
    return dequantize(Quantized(weight.codes, weight.scales, weight.spec, torch.float32))


def _packed(item: PackedModule, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Return the module's tensors under the names of its format."""
    weight = item.weights["weight"]
    codes, scale = weight.codes, weight.scales.scale
    scale = scale.reshape(1) if scale.dim() == 0 else scale  # transformers refuses 0-d scales
    assert scheme.weights is not None
    if scheme.format == "pack-quantized":
        found = {
            "weight_packed": pack_to_int32(codes, scheme.weights.num_bits),
            "weight_shape": torch.tensor(codes.shape),
        }
    else:
        found = {"weight": codes}
    found["weight_scale"] = scale.contiguous()
    for slot, value in item.inputs.items():
        found[f"{slot}_scale"] = value.reshape(1) if value.dim() == 0 else value
    return found


def _save_shards(tensors: dict[str, Tensor], path: Path) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file(
            {name: tensors[name].detach().cpu() for name in names},
            path / file,
            metadata={"format": "pt"},
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (path / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _save_config(
    model: Any, path: Path, quantization: dict[str, object], dtype: str | None
) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = config.architectures or [_class_name(model)]
    if dtype is not None:
        config.dtype = getattr(torch, dtype)
    config.quantization_config = {
        "quant_method": NAME,
        "version": compressed_tensors.__version__,
        "sparsity_config": {},
        "transform_config": {},
        **quantization,
    }
    config.save_pretrained(path)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(path)


def _class_name(model: nn.Module) -> str:
    from bittern.nn import original_class

    return original_class(model).__name__
