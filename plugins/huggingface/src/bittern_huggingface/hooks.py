"""What the plugin registers. Light: transformers is imported only inside the calls."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bittern.hooks import hookimpl
from bittern.records import CheckpointIO, DataConfig, Exporter, LoadConfig, ModelAdapter, ModuleRule
from bittern_huggingface.modules.rules import MODULE_RULES

if TYPE_CHECKING:
    import click
    from torch import nn

    from bittern.toolkit import Toolkit

__all__: list[str] = []


@hookimpl
def resolve_model(source: str, config: LoadConfig, toolkit: Toolkit) -> nn.Module | None:
    """Load a transformers checkpoint."""
    from bittern_huggingface.loading import load_model

    return load_model(source, config, toolkit)


@hookimpl
def resolve_model_adapter(model: nn.Module) -> ModelAdapter | None:
    """Describe a transformers model."""
    if "transformers" not in sys.modules:
        return None  # a live model of theirs has imported it; nobody else should pay for that
    from bittern_huggingface.adapter import make_adapter

    return make_adapter(model)


@hookimpl
def register_modules() -> tuple[ModuleRule, ...]:
    """Conv1D of GPT-2, and the experts that only their class tells."""
    return MODULE_RULES


@hookimpl
def discover_modules(model: nn.Module) -> list[ModuleRule]:
    """The experts and the attention of the model's own classes."""
    if "transformers" not in sys.modules:
        return []
    from bittern_huggingface.modules.discover import discovered_rules

    return discovered_rules(model)


@hookimpl
def resolve_calibration_data(source: str, model: nn.Module, config: DataConfig) -> Any:
    """Read .txt, .jsonl, .npy files and ``datasets`` specs."""
    from bittern_huggingface.data import read_data

    return read_data(source, model, config)


@hookimpl
def resolve_checkpoint_io(model: nn.Module) -> CheckpointIO | None:
    """Save and restore transformers models by their own files."""
    if "transformers" not in sys.modules:
        return None
    from bittern_huggingface.state import checkpoint_io

    return checkpoint_io(model)


@hookimpl
def register_exporters() -> list[Exporter]:
    """The compressed-tensors checkpoint."""
    return [
        Exporter(
            name="compressed-tensors",
            write="bittern_huggingface.compressed.write:write",
            verify="bittern_huggingface.compressed.verify:verify",
            check="bittern_huggingface.compressed.schemes:check",
            accepts="bittern_huggingface.adapter:is_transformers_model",
            client="transformers",
            priority=10,
            description="loads in transformers, vLLM and SGLang",
        )
    ]


@hookimpl
def register_commands(cli: click.Group) -> None:
    """``bittern demo``."""
    from bittern_huggingface.demo.command import demo

    cli.add_command(demo)
