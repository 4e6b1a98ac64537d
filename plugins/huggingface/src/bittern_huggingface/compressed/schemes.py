"""From a plan to the config models of the compressed-tensors package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from compressed_tensors.compressors.base import COMPRESSIBLE_MODULE_TYPES
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import nn

from bittern.errors import ExportError
from bittern.exporting import ExportContext
from bittern.nn import original_class
from bittern.numerics import FloatCodec, IntCodec, codec_of
from bittern.records import (
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Plan,
    PlanEntry,
    QuantizerSpec,
)
from bittern_huggingface.compressed.cache import cache_scheme, check_cache, is_attention
from bittern_huggingface.compressed.experts import (
    are_experts,
    check_experts,
    listed_experts,
    listed_names,
    of_one_expert,
    pattern_of,
)

__all__ = ["check", "make_config", "module_schemes"]


def check(model: nn.Module, context: ExportContext) -> None:
    """Refuse a plan that compressed-tensors cannot hold, before anything is computed.

    Raises:
        ExportError: Names the first module that does not fit, and what would.
    """
    tied = {name for group in context.adapter.tied for name in group}
    modules = dict(model.named_modules())
    for path, slots in context.plan.by_module().items():
        module = modules[path]
        if is_attention(slots):
            continue
        if are_experts(slots):
            check_experts(model, path, slots)
        elif not issubclass(original_class(module), COMPRESSIBLE_MODULE_TYPES):
            kind = original_class(module)
            raise ExportError(
                f"compressed-tensors holds Linear and Embedding, not {kind.__name__}",
                where=path,
                hint=_without(kind, modules, context.plan),
            )
        elif isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention):
            raise ExportError(
                "in the client, nn.MultiheadAttention reads the weight of this layer and never "
                "calls it, so its input would not be quantized",
                where=path,
                hint=f"leave it out (-o 'skip.+=\"{path}\"'), or --format safetensors",
            )
        for entry in slots.values():
            if entry.parameter in tied:
                raise ExportError(
                    "the weight is tied to another module's, which would stay unquantized",
                    where=entry.path,
                    hint="leave it out (skip: [{role: [head, embedding]}]), or untie it first",
                )
            if isinstance(entry.granularity, PerGroup) and entry.shape is not None:
                columns, size = entry.shape[entry.granularity.axis], entry.granularity.size
                if columns % size:
                    raise ExportError(
                        f"{columns} input features do not divide into groups of {size}, and "
                        "transformers refuses a partial group",
                        where=entry.path,
                        hint=f"-o 'rules.*.weight.size={_divisor(columns, size)}', or "
                        "granularity: channel",
                    )
    check_cache(model, context.plan)
    module_schemes(context.plan, model)


def _without(kind: type, modules: Mapping[str, nn.Module], plan: Plan) -> str:
    """Return how to export a plan that quantizes layers of a kind that the file does not hold."""
    others = any(
        not is_attention(slots) and not issubclass(original_class(modules[path]), kind)
        for path, slots in plan.by_module().items()
    )
    if not others:
        return "nothing else is quantized, so the one way is --format safetensors"
    return f"leave these out (-o 'skip.+={{class: {kind.__name__}}}'), or --format safetensors"


def module_schemes(plan: Plan, model: nn.Module) -> dict[str, QuantizationScheme]:
    """Return the compressed-tensors scheme of every quantized module but attention.

    Raises:
        ExportError: A slot has a format or granularity that compressed-tensors cannot say, or the
            experts of two layers differ.
    """
    modules = dict(model.named_modules())
    made: dict[tuple[object, ...], QuantizationScheme] = {}
    found: dict[str, QuantizationScheme] = {}
    for path, slots in plan.by_module().items():
        if is_attention(slots):
            continue
        experts = are_experts(slots)
        cls = nn.Linear if experts else original_class(modules[path])
        said = _as_linear(slots) if experts else slots
        key = (cls, *((slot, str(entry.spec)) for slot, entry in sorted(said.items())))
        if key not in made:
            made[key] = _scheme(path, said, cls)
        found[path] = made[key]
    _check_one_scheme(plan, model, found)
    return found


def _as_linear(slots: Mapping[str, PlanEntry]) -> dict[str, PlanEntry]:
    """Return the slots of one matrix of experts, as those of a linear layer."""
    found: dict[str, PlanEntry] = {}
    for entry in slots.values():
        name = "weight" if entry.kind == "weight" else "input"
        spec = replace(entry.spec, granularity=of_one_expert(entry.spec.granularity), stacked=False)
        found[name] = replace(entry, slot=name, spec=spec)
    return found


def _check_one_scheme(
    plan: Plan, model: nn.Module, schemes: Mapping[str, QuantizationScheme]
) -> None:
    """Refuse experts of several schemes: the client takes one for all."""
    experts = [
        path
        for path, slots in plan.by_module().items()
        if are_experts(slots) and not listed_experts(model.get_submodule(path))
    ]
    for path in experts[1:]:
        if schemes[path] is not schemes[experts[0]]:
            raise ExportError(
                f"transformers reads one scheme for all experts, and {experts[0]} has another",
                where=path,
                hint="give them one format, or --format safetensors",
            )


def _scheme(path: str, slots: Mapping[str, PlanEntry], cls: type) -> QuantizationScheme:
    names = {"weight": "weights", "input": "input_activations", "output": "output_activations"}
    unknown = set(slots) - set(names)
    if unknown or "weight" not in slots:
        raise ExportError(
            f"compressed-tensors cannot hold the slots {sorted(slots)}",
            where=path,
            hint="quantize weight, or weight and input",
        )
    args = {names[slot]: _args(entry) for slot, entry in slots.items()}
    try:
        scheme = QuantizationScheme(targets=[path], **args)
        scheme.format = infer_module_format(cls, scheme)
    except (ValueError, NotImplementedError, StopIteration) as error:
        raise ExportError(
            f"compressed-tensors has no format for {', '.join(str(e.spec) for e in slots.values())}"
            f": {error}",
            where=path,
            hint="use --format safetensors",
        ) from error
    return scheme


def _holds(number: NumberFormat) -> bool:
    """Whether the client decodes a format to the very values that were simulated."""
    codec = codec_of(number)
    if isinstance(codec, IntCodec):
        return not (codec.narrow or codec.unsigned or codec.asymmetric)
    return isinstance(codec, FloatCodec) and codec.storage == torch.float8_e4m3fn


def _args(entry: PlanEntry) -> QuantizationArgs:
    spec = entry.spec
    number = spec.format
    if not _holds(number):
        raise ExportError(
            f"compressed-tensors has no element format {number.name!r}"
            + (f" with {dict(number.options)}" if number.options else ""),
            where=entry.path,
            hint="int2 to int8 and fp8 fit; or use --format safetensors",
        )
    settings: dict[str, object] = {
        "num_bits": number.bits,
        "type": number.kind,
        "symmetric": True,
        "dynamic": spec.dynamic,
        "observer": None,
    }
    return QuantizationArgs(**settings, **_strategy(spec, entry))


def _strategy(spec: QuantizerSpec, entry: PlanEntry) -> dict[str, object]:
    match spec.granularity:
        case PerTensor() if entry.kind == "weight" or not spec.dynamic:
            return {"strategy": "tensor"}
        case PerChannel(axis=0) if entry.kind == "weight":
            return {"strategy": "channel"}
        case PerToken() if spec.dynamic:
            return {"strategy": "token"}
        case PerGroup(size=size):
            return {"strategy": "group", "group_size": size}
        case PerBlock(rows=rows, cols=cols):
            return {"strategy": "block", "block_structure": [rows, cols]}
    raise ExportError(
        f"compressed-tensors cannot say {spec}",
        where=entry.path,
        hint="per tensor, channel, group or block weights; per tensor or dynamic per token inputs",
    )


def make_config(plan: Plan, model: nn.Module) -> dict[str, object]:
    """Return the ``quantization_config`` of config.json.

    One scheme for all is written as the class it targets and an ``ignore`` list of exact names, as
    every engine reads it; several schemes name their modules one by one.
    """
    schemes = module_schemes(plan, model)
    groups: dict[str, QuantizationScheme] = {}
    members: dict[int, list[str]] = {}
    modules, slots = dict(model.named_modules()), plan.by_module()
    for path, scheme in schemes.items():
        targets = [path]
        if are_experts(slots[path]):
            listed = listed_experts(modules[path])
            targets = listed_names(model, path) if listed else [pattern_of(model, path)]
        members.setdefault(id(scheme), []).extend(targets)
    unique = list({id(scheme): scheme for scheme in schemes.values()}.values())
    classes = {
        "Embedding" if issubclass(original_class(modules[path]), nn.Embedding) else "Linear"
        for path in schemes
    }
    ignore = [
        path
        for path, module in modules.items()
        if path not in schemes
        and any(base.__name__ in classes for base in original_class(module).__mro__)
    ]
    for path, module in modules.items():
        if path not in schemes and listed_experts(module):
            ignore += listed_names(model, path)
    for index, scheme in enumerate(unique):
        whole = len(unique) == 1
        targets = sorted(classes) if whole else members[id(scheme)]
        groups[f"group_{index}"] = scheme.model_copy(update={"targets": targets})
    formats = {str(CompressionFormat(s.format).value) for s in unique if s.format is not None}
    config = QuantizationConfig(
        config_groups=dict(groups),
        format=formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
        kv_cache_scheme=cache_scheme(plan),
    )
    data: dict[str, object] = config.model_dump(mode="json")
    return data


def _divisor(columns: int, size: int) -> int:
    """Return the largest power of two that divides ``columns``, at most ``size``."""
    return min(columns & -columns, size)
