"""What the plugin registers. Light: Megatron-Core is imported only inside the calls."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from bittern.hooks import hookimpl
from bittern.records import CheckpointIO, ModelAdapter, ModuleRule, Plan
from bittern_megatron.rules import MODULE_RULES

if TYPE_CHECKING:
    from torch import nn

__all__: list[str] = []


def _imported() -> bool:
    """Whether a live model of theirs can be there; nobody else should pay for the import."""
    return "megatron.core.tensor_parallel.layers" in sys.modules


@hookimpl
def register_modules() -> tuple[ModuleRule, ...]:
    """Column and row parallel linear layers."""
    return MODULE_RULES


@hookimpl
def resolve_model_adapter(model: nn.Module) -> ModelAdapter | None:
    """Describe a model of Megatron-Core."""
    if not _imported():
        return None
    from bittern_megatron.adapter import make_adapter
    from bittern_megatron.memory import forget_traced

    forget_traced()  # whatever asks for the adapter may run the model next
    return make_adapter(model)


@hookimpl
def after_convert(model: nn.Module, plan: Plan) -> None:
    """Give weights that are sharded over several ranks one range."""
    if not _imported():
        return
    from bittern_megatron.parallel import share_ranges

    share_ranges(model)


@hookimpl(wrapper=True)
def run_calibration() -> Generator[None, int, int]:
    """Let the data pass begin with memory of its own: the model may have been traced before."""
    if _imported():
        from bittern_megatron.memory import forget_traced

        forget_traced()
    return (yield)


@hookimpl
def resolve_checkpoint_io(model: nn.Module, path: Path) -> CheckpointIO | None:
    """Save and load by Megatron's dist_checkpointing."""
    if not _imported():
        return None
    from bittern_megatron.checkpoint import make_io

    return make_io(model, path)
