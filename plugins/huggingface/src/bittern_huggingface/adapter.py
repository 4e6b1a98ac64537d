"""What only transformers knows about its models, read from their structure, not from tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from bittern.nn import original_class
from bittern.records import ModelAdapter
from bittern_huggingface.loading import source_of

__all__ = ["is_transformers_model", "make_adapter"]


def is_transformers_model(model: nn.Module) -> bool:
    """Return whether ``model`` is a transformers model."""
    return isinstance(model, transformers.PreTrainedModel)


def make_adapter(model: nn.Module) -> ModelAdapter | None:
    """Describe a transformers model; ``None`` for anything else."""
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    source = source_of(model)
    embeddings = _embeddings(model.get_input_embeddings)
    vocab = getattr(embeddings, "num_embeddings", None)
    causal = _is_causal(model)
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    quantizer = getattr(model, "hf_quantizer", None)
    return ModelAdapter(
        blocks=_blocks(model),
        roles=_roles(model),
        dtype=source.dtype if source is not None else None,
        causal=causal,
        quantized_by=None if quantizer is None else _method(quantizer),
        vocab_size=vocab,
        example_inputs=lambda: _example(model, vocab),
        logits=_logits if causal else None,
        call_kwargs={"use_cache": False} if takes_cache else {},
        tied=_tied(model),
    )


def _embeddings(find: Callable[[], Any]) -> Any:
    """Ask a model for its embeddings; those without any (ResNet, MobileNet) raise."""
    try:
        return find()
    except (NotImplementedError, AttributeError):
        return None


def _method(quantizer: Any) -> str:
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def _logits(output: Any) -> torch.Tensor:
    found: torch.Tensor = output.logits
    return found


def _is_causal(model: transformers.PreTrainedModel) -> bool:
    """Decoders with a language-model head; encoders, encoder-decoders and classifiers are not."""
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    name = original_class(model).__name__
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    listed = any(cls.__name__ == name for cls in _classes(mapping, type(model.config)))
    multimodal = name.endswith("ForConditionalGeneration")
    if not listed and not multimodal and not name.endswith("ForCausalLM"):
        return False
    # Bert and its kin are listed too, but attend to both sides unless told to be decoders.
    return getattr(model.config, "is_decoder", None) is not False or not _is_bidirectional(model)


def _classes(mapping: Any, config: type) -> tuple[type, ...]:
    try:
        found = mapping[config]
    except KeyError:
        return ()
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _is_bidirectional(model: transformers.PreTrainedModel) -> bool:
    return any(
        getattr(module, "is_causal", None) is False
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    )


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the longest ModuleList of one class: the repeated blocks."""
    best: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({original_class(m) for m in module}) == 1:
            paths = tuple(f"{path}.{i}" for i in range(len(module)))
            depth_first = best and paths[0].startswith(best[0])  # experts inside a block
            if len(paths) > len(best) and not depth_first:
                best = paths
    return best


def _roles(model: transformers.PreTrainedModel) -> Mapping[str, str]:
    """Return module path to role, from what modules are rather than from what they are called."""
    roles: dict[str, str] = {}
    head = _embeddings(model.get_output_embeddings)
    embeddings = _embeddings(model.get_input_embeddings)
    for path, module in model.named_modules():
        cls = original_class(module)
        if module is head:
            roles[path] = "head"
        elif module is embeddings or isinstance(module, nn.Embedding):
            roles[path] = "embedding"
        elif (
            _is_router(cls)
            or roles.get(path.rpartition(".")[0]) == "router"  # the layers inside of one
            or _gates_experts(model, path, module)
        ):
            roles[path] = "router"
        elif cls.__name__.endswith(("Norm", "LayerNorm")):
            roles[path] = "norm"
    return roles


def _is_router(cls: type) -> bool:
    name = cls.__name__  # gates are many things, those of a mixture of experts choose among them
    return "Router" in name or ("moe" in name.lower() and name.endswith(("Gate", "Gating")))


def _gates_experts(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Return whether a small linear beside ``experts`` chooses among them, or weighs one."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(module, nn.Linear) or not hasattr(parent, "experts"):
        return False
    experts = parent.experts
    count = len(experts) if isinstance(experts, nn.ModuleList) else None
    count = count if count is not None else getattr(experts, "num_experts", None)
    return module.out_features in (1, count)


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _example(model: transformers.PreTrainedModel, vocab: int | None) -> Mapping[str, Any]:
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(model.config, "num_channels", 3)
        image = torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)
        return {"pixel_values": image}
    if vocab is None or model.main_input_name != "input_ids":
        return {name: tensor.to(model.device) for name, tensor in model.dummy_inputs.items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (1, 16), generator=generator).to(model.device)
    both_sides = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids} if both_sides else {"input_ids": ids}
