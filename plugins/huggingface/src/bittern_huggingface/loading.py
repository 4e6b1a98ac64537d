"""Loads transformers checkpoints, and says clearly what is wrong with one that does not load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bittern.errors import ModelError
from bittern.reading import read_json
from bittern.records import LoadConfig
from bittern.toolkit import Toolkit

__all__ = ["Source", "load_model", "source_of"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SOURCE = "_bittern_source"


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        path: Directory or hub name.
        dtype: Name of the checkpoint's dtype, which may not be the one in memory.
    """

    path: str
    dtype: str | None


def source_of(model: nn.Module) -> Source | None:
    """Return where `load_model` took a model from; ``None`` for a model made otherwise."""
    found = getattr(model, _SOURCE, None)
    return found if isinstance(found, Source) else None


def load_model(source: str, config: LoadConfig, toolkit: Toolkit) -> nn.Module | None:
    """Load the model that ``source`` names, in eval mode, quantized if it was saved so.

    Args:
        source: A directory with config.json, or a hub name.
        config: Dtype ``"auto"`` is float32 on a CPU (bfloat16 matmuls are slow there and rounding
            would blur what quantization costs) and the checkpoint's own elsewhere.
        toolkit: The plugins, for a saved state.

    Returns:
        ``None`` if ``source`` is no directory and cannot be a hub name.

    Raises:
        ModelError: No model there, weights missing or damaged, or custom code needed.
        CheckpointError: The saved state beside the weights is damaged or does not fit them.
    """
    path = Path(source)
    if path.exists():
        _check_directory(path)
    elif not _HUB_NAME.fullmatch(source) or source.startswith("."):
        return None
    settings = _read_config(source)
    device = "cpu" if config.device == "disk" else config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = config.dtype
    if dtype == "auto":
        dtype = torch.float32 if device == "cpu" else "auto"
    elif not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"{dtype!r} is not a dtype", hint="use auto, float32, bfloat16 or float16")
    else:
        dtype = getattr(torch, dtype)
    if config.device == "disk":
        from bittern_huggingface.ondisk import make_on_disk

        model = make_on_disk(_class_for(settings), settings, path, dtype=dtype)
    else:
        model = _make(settings, source, dtype)
    checkpoint_dtype = settings.dtype
    name = None if checkpoint_dtype is None else str(checkpoint_dtype).removeprefix("torch.")
    setattr(model, _SOURCE, Source(source, name))
    model = model.to(device).eval() if config.device != "disk" else model.eval()
    _quantize_as_saved(model, path, toolkit)
    return model  # type: ignore[no-any-return]


def _make(settings: Any, source: str, dtype: Any) -> Any:
    """Make the model with its weights; without, where they are packed and in our file."""
    from bittern_huggingface.state import is_packed_state

    cls = _class_for(settings)
    if is_packed_state(Path(source)):
        dtype = settings.dtype if dtype == "auto" else dtype
        make = getattr(cls, "from_config", None) or cls._from_config  # of Auto classes, of models
        return make(settings, dtype=dtype)
    try:
        model, info = cls.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,  # not even by a question in the terminal
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many kinds for a bad checkpoint
        raise ModelError(
            f"transformers cannot load it: {_first_line(error)}",
            where=source,
            hint="check that the checkpoint is complete and of a supported architecture",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing from the checkpoint: {', '.join(missing[:3])}",
            where=source,
            hint="download it again; transformers would run them with random values",
        )
    return model


def _quantize_as_saved(model: nn.Module, path: Path, toolkit: Toolkit) -> None:
    """Restore the state that is in the directory, or beside its weights, if there is one."""
    from bittern_huggingface.state import restore_loaded, state_of

    state = state_of(path)
    if state is not None:
        restore_loaded(model, state, toolkit)


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ModelError("a file is not a model", where=str(path), hint="give its directory")
    file = path / "config.json"
    if not file.is_file() and (path / "manifest.json").is_file():
        raise ModelError(
            "this directory holds the state of a quantized model, and does not say how to make one",
            where=str(path),
            hint="make the model, and call bittern.restore(model, path)",
        )
    if not file.exists():
        raise ModelError(
            "there is no config.json in this directory",
            where=str(path),
            hint="give a directory that save_pretrained wrote, or a hub name",
        )
    settings = read_json(file, error=ModelError, strict=False)
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ModelError(
            "config.json names no model_type", where=str(path), hint="is this a model's directory?"
        )


def _read_config(source: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        text = _first_line(error)
        if "trust_remote_code" in str(error):
            raise ModelError(
                "the model needs code from its own repository, which bittern does not run",
                where=source,
                hint="load it yourself with trust_remote_code=True and call bittern.quantize",
            ) from error
        if not Path(source).exists():
            raise ModelError(
                f"there is no such directory, and the hub does not give it: {text}",
                where=source,
                hint="check the path; behind a gate or offline, download the model first",
            ) from error
        raise ModelError(f"config.json cannot be used: {text}", where=source) from error


def _class_for(settings: Any) -> Any:
    """Return the class that config.json names; without one, the causal LM of the model type."""
    for name in settings.architectures or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    known = type(settings) in mapping.keys()  # noqa: SIM118 - a lazy mapping without __contains__
    return transformers.AutoModelForCausalLM if known else transformers.AutoModel


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
