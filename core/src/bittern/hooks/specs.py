"""Every hook of Bittern, in the order in which a model meets them.

``register_*`` hooks are called once per Toolkit, on the first use of what they register; they must
be cheap and import nothing heavy. ``resolve_*`` hooks: the first answer that is not ``None`` wins.
``before_*`` and ``after_*`` notify everybody. ``run_*``: the first result wins, core's own
implementation comes last, plugins may wrap it. An implementation may take any subset of the
arguments, so adding an argument is always compatible. No hook is called on a forward path.

Each docstring says when the hook is called, its arguments and its result. "Reserved" marks a hook
that is specified but that this version does not call yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.hooks.markers import hookspec

if TYPE_CHECKING:
    import click
    from torch import nn

    from bittern.records import (
        Algorithm,
        CheckpointIO,
        DataConfig,
        Exporter,
        ExportReport,
        KernelRule,
        LeafRule,
        LoadConfig,
        Mode,
        ModelAdapter,
        ModuleRule,
        NumberFormat,
        OpRule,
        ParallelState,
        Plan,
        RecipeSource,
        SymbolRule,
    )

__all__: list[str] = []


# --- Registration ---------------------------------------------------------------------------------


@hookspec
def register_modules() -> Iterable[ModuleRule]:  # type: ignore[empty-body]
    """Say which module classes can be quantized and how.

    Called once, on the first plan.

    Returns:
        One `ModuleRule` per module class: its quantized class and its quantizer slots.
    """


@hookspec
def register_symbols() -> Iterable[SymbolRule]:  # type: ignore[empty-body]
    """Say which dimensions a module class has.

    Returns:
        One `SymbolRule` per module class.
    """


@hookspec
def register_trace_leaves() -> Iterable[LeafRule]:  # type: ignore[empty-body]
    """Name module classes that the tracer must not enter.

    Returns:
        One `LeafRule` per module class.
    """


@hookspec
def register_trace_ops() -> Iterable[OpRule]:  # type: ignore[empty-body]
    """Say how dimensions flow through an operator.

    Returns:
        One `OpRule` per operator.
    """


@hookspec
def register_formats() -> Iterable[NumberFormat]:  # type: ignore[empty-body]
    """Add number formats that recipes can name.

    Called once, on the first plan.

    Returns:
        One `NumberFormat` per format.
    """


@hookspec
def register_algorithms() -> Iterable[Algorithm]:  # type: ignore[empty-body]
    """Add calibration algorithms and say what they need.

    Called once, on the first plan.

    Returns:
        One `Algorithm` per name.
    """


@hookspec
def register_modes() -> Iterable[Mode]:  # type: ignore[empty-body]
    """Add optimization steps that can be stacked, saved and replayed.

    Called once, on the first `bittern.apply_mode`, save or restore.

    Returns:
        One `Mode` per step.
    """


@hookspec
def register_exporters() -> Iterable[Exporter]:  # type: ignore[empty-body]
    """Add checkpoint formats.

    Called once, on the first export, verification or planned export.

    Returns:
        One `Exporter` per format.
    """


@hookspec
def register_kernels() -> Iterable[KernelRule]:  # type: ignore[empty-body]
    """Add fast implementations, bit-exact with core's reference.

    Called once, on the first conversion; never on a forward path.

    Returns:
        One `KernelRule` per (op, device, formats).
    """


@hookspec
def register_recipes() -> Iterable[RecipeSource]:  # type: ignore[empty-body]
    """Add named recipes.

    Called once, on the first use of a recipe's name.

    Returns:
        One `RecipeSource` per recipe.
    """


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add sub-commands to ``bittern``.

    Called when the command line starts, so the module must stay light: import inside the command.

    Args:
        cli: The root click group.
    """


# --- Resolution -----------------------------------------------------------------------------------


@hookspec(firstresult=True)
def resolve_model(source: str, config: LoadConfig, toolkit: Any) -> nn.Module | None:
    """Load the model that a command line or a user names.

    Args:
        source: A directory or a hub name.
        config: Device and dtype.
        toolkit: The `bittern.Toolkit` that loads it, with the plugins that a saved state may need.

    Returns:
        The model in eval mode, or ``None`` if ``source`` is not for this plugin.
    """


@hookspec(firstresult=True)
def resolve_model_adapter(model: nn.Module) -> ModelAdapter | None:
    """Say what only the model's framework knows: blocks, roles, vocabulary, example inputs.

    Called once per plan, calibration, evaluation and export.

    Args:
        model: The live model.

    Returns:
        A `ModelAdapter`, or ``None`` for somebody else's model.
    """


@hookspec(firstresult=True)
def resolve_weight_access(module: nn.Module, write: bool) -> AbstractContextManager[None] | None:
    """Make offloaded, sharded or meta weights of one module readable, and writable.

    Called around every access to a weight outside a forward pass.

    Args:
        module: The module that owns the weights.
        write: Whether changes have to persist.

    Returns:
        A context manager within which the weights are real tensors, or ``None``.
    """


@hookspec(firstresult=True)
def resolve_parallel_state(module: nn.Module) -> ParallelState | None:
    """Say over which process groups a module's statistics are reduced. Reserved.

    Args:
        module: A module to be quantized.

    Returns:
        A `ParallelState`, or ``None`` for one process.
    """


@hookspec(firstresult=True)
def resolve_calibration_data(
    source: str, model: nn.Module, config: DataConfig
) -> Iterable[Any] | None:
    """Turn a path or a name into batches.

    Args:
        source: What ``--data`` says, or the string given to ``quantize(data=...)``.
        model: The model that will take the batches.
        config: Samples, row length, batch size, seed.

    Returns:
        A re-iterable of batches that the model takes, or ``None`` for an unknown source.
    """


@hookspec(firstresult=True)
def resolve_checkpoint_io(model: nn.Module, path: Path) -> CheckpointIO | None:
    """Save and restore through the framework's own format.

    Called once per save, and per restore of what a plugin's `CheckpointIO` saved.

    Args:
        model: The model to save, or to restore into.
        path: The directory as the user names it.

    Returns:
        A `CheckpointIO`, or ``None`` for core's safetensors.
    """


@hookspec
def discover_modules(model: nn.Module) -> Iterable[ModuleRule]:  # type: ignore[empty-body]
    """Add rules that only a live model shows, such as remote-code experts.

    Called once per plan, after `register_modules`.

    Args:
        model: The live model.

    Returns:
        Further `ModuleRule`, valid for this model only.
    """


# --- Steps ----------------------------------------------------------------------------------------


@hookspec
def after_convert(model: nn.Module, plan: Plan) -> None:
    """Fix up what the class swap disturbed.

    Args:
        model: The converted model.
        plan: What was converted.
    """


@hookspec(firstresult=True)
def run_calibration(model: nn.Module, plan: Plan, forward: Callable[[], int]) -> int | None:
    """Run the data pass; wrap it to change how the model is run.

    Args:
        model: The converted model, its quantizers observing.
        plan: The plan.
        forward: Runs all data through the model and returns the number of batches.

    Returns:
        The number of batches.
    """


@hookspec
def after_export(report: ExportReport, path: Path) -> None:
    """Add to a written checkpoint: a model card, further validation.

    Called before the directory gets its final name.

    Args:
        report: What was written.
        path: The directory as it is now.
    """


# Hooks that return records: name to the record's class name, used to check what plugins return.
RETURNS: Mapping[str, str] = {
    "register_modules": "ModuleRule",
    "register_symbols": "SymbolRule",
    "register_trace_leaves": "LeafRule",
    "register_trace_ops": "OpRule",
    "register_formats": "NumberFormat",
    "register_algorithms": "Algorithm",
    "register_modes": "Mode",
    "register_exporters": "Exporter",
    "register_kernels": "KernelRule",
    "register_recipes": "RecipeSource",
    "discover_modules": "ModuleRule",
}
