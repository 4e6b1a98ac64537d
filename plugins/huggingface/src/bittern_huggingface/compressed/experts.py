"""Experts in a checkpoint: one matrix per expert and projection, under the names on disk.

transformers keeps the weights of all experts in one parameter. What it writes, and what every
engine reads, are matrices such as ``mlp.experts.0.gate_proj.weight``, under names that differ by
family. It converts them both ways itself, and it is asked for the names. When it loads compressed
experts it decompresses their weights, and nothing quantizes their inputs.

The experts of Llama 4 are different: for a compressed checkpoint transformers makes linear layers
of them, one by one, so they are written as what these are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from bittern.errors import ExportError
from bittern.exporting.packed import PackedModule
from bittern.nn import original_class
from bittern.numerics import Quantized, Scales
from bittern.records import Granularity, PerChannel, PerGroup, PerTensor, PlanEntry

__all__ = [
    "are_experts",
    "check_experts",
    "leave_out",
    "listed_experts",
    "listed_names",
    "names_on_disk",
    "of_one_expert",
    "pattern_of",
    "split_packed",
    "split_plain",
]

METHOD = QuantizationMethod.COMPRESSED_TENSORS
UP, DOWN = "gate_up_proj", "down_proj"
# Of the experts that become linear layers: their names, and whose input they read.
LISTED = {"gate_proj": "gate_up_input", "up_proj": "gate_up_input", "down_proj": "down_input"}


def are_experts(slots: Mapping[str, PlanEntry]) -> bool:
    """Whether the slots of a module are those of stacked weights."""
    return any(entry.slot_rule is not None and entry.slot_rule.stacked for entry in slots.values())


def listed_experts(module: nn.Module) -> bool:
    """Whether the client makes a list of linear layers of these experts."""
    patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(original_class(module).__name__)
    return patch is not None and METHOD in patch["quantization_methods"]


def leave_out(path: str) -> str:
    """Return the override that takes experts out of a recipe."""
    return f"-o 'skip.+=\"*.{path.rpartition('.')[2]}\"'"


def check_experts(model: nn.Module, path: str, slots: Mapping[str, PlanEntry]) -> None:
    """Refuse experts that the client does not load as they were simulated.

    Args:
        model: The model.
        path: Path of the experts.
        slots: Their slots.

    Raises:
        ExportError: They are stored as one tensor, a weight is left out, their inputs are
            quantized, or the weights have groups of fp8 or blocks.
    """
    out = leave_out(path)
    module = model.get_submodule(path)
    kind = original_class(module).__name__
    weights = {entry.tensor: entry for entry in slots.values() if entry.kind == "weight"}
    inputs = [entry for entry in slots.values() if entry.kind != "weight"]
    if set(weights) != {UP, DOWN} or len({str(e.spec) for e in weights.values()}) > 1:
        raise ExportError(
            "compressed-tensors holds experts whose two weights have one format",
            where=path,
            hint=f"quantize {UP} and {DOWN} alike, or leave the experts out with {out}",
        )
    if listed_experts(module):
        if len(inputs) not in (0, 2) or len({str(e.spec) for e in inputs}) > 1:
            raise ExportError(
                "compressed-tensors holds experts whose two inputs have one format",
                where=inputs[0].path,
                hint=f"quantize gate_up_input and down_input alike, or neither; or {out}",
            )
        return
    if not names_on_disk(model, path):
        raise ExportError(
            f"transformers stores the experts of {kind} as one tensor, for which "
            "compressed-tensors has no form",
            where=path,
            hint=f"leave them out with {out}, or --format safetensors",
        )
    if inputs:
        name = path.rpartition(".")[2]
        raise ExportError(
            "transformers decompresses experts when it loads them, so it would not quantize their "
            "inputs",
            where=inputs[0].path,
            hint="quantize only their weights with "
            f"-o 'rules.+={{match: \"*.{name}\", input: null}}', "
            f"leave the experts out with {out}, or --format safetensors",
        )
    spec = weights[UP].spec
    fine = isinstance(spec.granularity, PerGroup) and spec.format.kind == "float"
    if fine or not isinstance(spec.granularity, PerChannel | PerGroup):
        raise ExportError(
            f"transformers does not decompress experts in {spec}",
            where=weights[UP].path,
            hint="fp8 experts are per tensor or channel, int8 and int4 experts also in groups; "
            f"or leave them out with {out}",
        )


def names_on_disk(model: nn.Module, path: str) -> tuple[str, ...]:
    """Return the module names of the experts' matrices, ``()`` where they are not one by one."""
    module = model.get_submodule(path)
    shapes = {n: torch.empty_like(getattr(module, n), device="meta") for n in (UP, DOWN)}
    count = len(shapes[UP])
    try:
        found = _split(model, path, shapes)
    except (KeyError, ValueError, RuntimeError):
        return ()
    matrices = all(name.endswith(".weight") and t.dim() == 2 for name, t in found.items())
    if not matrices or len(found) % count:
        return ()
    return tuple(name.removesuffix(".weight") for name in found)


def listed_names(model: nn.Module, path: str) -> list[str]:
    """Return the names of the linear layers that the client makes of listed experts."""
    count = len(getattr(model.get_submodule(path), UP))
    return [f"{path}.{index}.{name}" for index in range(count) for name in LISTED]


def pattern_of(model: nn.Module, path: str) -> str:
    """Return the target of quantization_config that means the matrices of experts.

    It is a regular expression with the word experts in it, by which the client tells the scheme of
    experts from that of other layers.
    """
    first = names_on_disk(model, path)[0]
    prefix = re.match(r"(.*?experts)\.\d+\.", first)
    return f"re:{re.escape(prefix[1] if prefix else first)}[.].*"


def of_one_expert(granularity: Granularity) -> Granularity:
    """Return the granularity of one matrix ``(out, in)`` of stacked weights."""
    match granularity:
        case PerChannel(axes=axes):
            return PerChannel(0) if len(axes) > 1 else PerTensor()
        case PerGroup(size=size):
            return PerGroup(size)
    return granularity


def split_packed(model: nn.Module, item: PackedModule) -> Iterator[PackedModule]:
    """Yield the matrices of packed experts, each as a module with a ``weight``."""
    transposed = listed_experts(item.module)
    spec = item.weights[UP].spec
    one = replace(spec, granularity=of_one_expert(spec.granularity), stacked=False)
    codes, scales = {}, {}
    for name, weight in item.weights.items():
        code, scale = weight.codes, weight.scales.scale
        code, scale = (code.mT, scale.mT) if transposed else (code, scale)
        codes[name] = code
        scales[name] = scale.expand(*code.shape[:2], scale.shape[-1])
    apart = _listed if transposed else _converted
    scale_of = dict(apart(model, item.path, scales))
    for full, code in apart(model, item.path, codes):
        path = full.removesuffix(".weight")
        scale = scale_of[full].reshape(len(code), -1)  # transformers < 5.23 squeezes all sizes of 1
        if isinstance(one.granularity, PerTensor):
            scale = scale[0, 0]
        matrix = Quantized(code.contiguous(), Scales(scale.clone()), one, torch.float32)
        inputs = {}
        if transposed:
            index, _, name = path.removeprefix(f"{item.path}.").partition(".")
            ranges = item.inputs.get(LISTED[name])
            inputs = {} if ranges is None else {"input": ranges[int(index)].clone()}
        yield replace(item, path=path, weights={"weight": matrix}, inputs=inputs)


def split_plain(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they are, those of listed experts that stay unquantized one by one."""
    found = dict(tensors)
    for path, module in model.named_modules():
        if listed_experts(module) and f"{path}.{UP}" in found:
            stacked = {name: found.pop(f"{path}.{name}").mT for name in (UP, DOWN)}
            found |= {name: t.contiguous() for name, t in _listed(model, path, stacked)}
    return found


def _split(model: nn.Module, path: str, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    full = {f"{path}.{name}": tensor for name, tensor in stacked.items()}
    found: dict[str, Any] = revert_weight_conversion(model, full)  # type: ignore[arg-type]
    return found


def _converted(
    model: nn.Module, path: str, stacked: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name on disk and matrix, as transformers writes them."""
    yield from _split(model, path, stacked).items()


def _listed(
    model: nn.Module, path: str, stacked: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and matrix of the linear layers; weights ``(experts, out, in)``."""
    gate, up = stacked[UP].chunk(2, dim=1)
    for index in range(len(gate)):
        for name, tensor in zip(LISTED, (gate, up, stacked[DOWN]), strict=True):
            yield f"{path}.{index}.{name}.weight", tensor[index]
