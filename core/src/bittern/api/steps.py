"""Look at a model, quantize it, measure it, write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.toolkit import Toolkit, toolkit_or_default

if TYPE_CHECKING:
    from torch import nn

    from bittern.config import RecipeLike
    from bittern.records import (
        CalibrationSummary,
        DataConfig,
        Evaluation,
        ExportReport,
        LoadConfig,
        Plan,
        Verification,
    )
    from bittern.report import Result
    from bittern.runtime import Data, Progress
    from bittern.tracing import GraphCollection, SymMap, Trace

__all__ = [
    "analyze_symbols",
    "calibrate",
    "evaluate",
    "export",
    "load",
    "plan",
    "quantize",
    "recursive_trace",
    "revert",
    "trace",
    "verify",
]


def load(
    source: str, *, config: LoadConfig | None = None, toolkit: Toolkit | None = None
) -> nn.Module:
    """Load a model by directory or hub name, through the plugin that knows it.

    Args:
        source: A directory or a name.
        config: Dtype and device.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        ModelError: It cannot be loaded, or is no model.
    """
    return toolkit_or_default(toolkit).load(source, config)


def trace(model: nn.Module, example_inputs: Any = None, *, toolkit: Toolkit | None = None) -> Trace:
    """Run a model once on example inputs and find which of its tensors belong together.

    The run computes shapes only, so it works for models on the meta device too; where the model
    looks at values it is run for real.

    Args:
        model: Any PyTorch model; it is not changed.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments; ``None``
            takes what the model's framework knows.
        toolkit: Plugins to use; all that are installed by default.

    Returns:
        Coupled dimensions, shared inputs, foldable producers, and what could not be analysed.

    Raises:
        TraceError: There are no example inputs, or nothing runs with them.
    """
    return toolkit_or_default(toolkit).trace(model, example_inputs)


def recursive_trace(
    model: nn.Module,
    concrete_args: Mapping[str, Any] | None = None,
    *,
    toolkit: Toolkit | None = None,
) -> GraphCollection:
    """Trace a model with torch.fx, and every module that cannot be traced on its own.

    Args:
        model: Any PyTorch model; it is not changed.
        concrete_args: Arguments of the model's ``forward`` that are not symbolic.
        toolkit: Plugins to use; they name modules that are not looked into.
    """
    return toolkit_or_default(toolkit).recursive_trace(model, concrete_args)


def analyze_symbols(
    model: nn.Module,
    concrete_args: Mapping[str, Any] | None = None,
    *,
    toolkit: Toolkit | None = None,
) -> SymMap:
    """Say of every width of a model whether it may change and what changes along, without inputs.

    Args:
        model: Any PyTorch model; it is not changed.
        concrete_args: Arguments of the model's ``forward`` that are not symbolic.
        toolkit: Plugins to use; they say which dimensions module classes have.
    """
    return toolkit_or_default(toolkit).analyze_symbols(model, concrete_args)


def plan(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    overrides: Sequence[str] = (),
    toolkit: Toolkit | None = None,
) -> Plan:
    """Say who would be quantized how, by whose rule, and what is skipped and why.

    Args:
        model: Any PyTorch model; it is not changed.
        recipe: A recipe's name, YAML file or data.
        overrides: ``"dotted.path=value"`` on top of the recipe.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        RecipeError: The recipe is unknown, malformed, or does not fit the model.
        PlanError: Nothing would be quantized.
    """
    return toolkit_or_default(toolkit).plan(model, recipe, overrides=overrides)


def quantize(
    model: nn.Module,
    recipe: RecipeLike | Plan,
    data: Data | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    config: DataConfig | None = None,
    layerwise: bool = False,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
    toolkit: Toolkit | None = None,
) -> Result:
    """Quantize a model in place: plan, convert, calibrate.

    Args:
        model: Any PyTorch model. Its modules keep their names, parameters and ``state_dict`` keys.
        recipe: A recipe's name, YAML file or data, or a plan of this model.
        data: Calibration batches, a function that runs the model (with the model as its argument,
            or none), or a path that a plugin reads. Recipes without static activations need none.
        overrides: ``"dotted.path=value"`` on top of the recipe.
        config: How a path is read.
        layerwise: Whether the recipe's algorithms run on one block after the other, which keeps
            the activations of one block at a time. Those that see quantized inputs always do.
        work_dir: A directory in which blocks that are done are kept; implies ``layerwise``. Killed
            at any point and started again on the same model and data, the result is the same.
        progress: Shows where long work is.
        toolkit: Plugins to use; all that are installed by default.

    Returns:
        The model, its plan and a report.

    Raises:
        BitternError: Bad recipe, data or weights; the model is then what it was.
    """
    return toolkit_or_default(toolkit).quantize(
        model,
        recipe,
        data,
        overrides=overrides,
        config=config,
        layerwise=layerwise,
        work_dir=None if work_dir is None else Path(work_dir),
        progress=progress,
    )


def calibrate(
    model: nn.Module,
    data: Data | str | Path | None = None,
    *,
    config: DataConfig | None = None,
    progress: Progress | None = None,
    toolkit: Toolkit | None = None,
) -> CalibrationSummary:
    """Calibrate a quantized model again, with the algorithms of its plan.

    Args:
        model: A model that `quantize` converted.
        data: As for `quantize`.
        config: How a path is read.
        progress: Shows where long work is.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        CalibrationError: Data is needed and missing, or NaN or Inf was met.
    """
    from bittern.convert import plan_of

    tools = toolkit_or_default(toolkit)
    batches = tools.data(data, model, config) if data is not None else None
    return tools.calibrate(model, plan_of(model), batches, progress=progress)


def revert(model: nn.Module) -> None:
    """Give a quantized model its original classes back, in place.

    Weights that an algorithm wrote (``awq``, ``gptq``, ``learn-rounding``) stay as it wrote them:
    keep a copy of the model, or load it again, for the weights of before.
    """
    from bittern.convert import revert as undo

    undo(model)


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    config: DataConfig | None = None,
    reference: bool = True,
    layers: bool = True,
    progress: Progress | None = None,
    toolkit: Toolkit | None = None,
) -> Evaluation:
    """Measure a model, and a quantized one against itself with the quantizers off.

    Args:
        model: A plain or a quantized model; it is left as it was.
        data: Batches of token ids (perplexity), ``(input, label)`` pairs (accuracy), plain inputs,
            or a path that a plugin reads.
        config: How a path is read.
        reference: Whether to run a quantized model a second time unquantized, for KL and SQNR.
        layers: Whether to measure each quantized module's own output error.
        progress: Shows where long work is.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        DataError: There is no usable batch.
    """
    return toolkit_or_default(toolkit).evaluate(
        model, data, config=config, reference=reference, layers=layers, progress=progress
    )


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    verify: bool = True,
    data: Any = None,
    allow_uncalibrated: bool = False,
    progress: Progress | None = None,
    toolkit: Toolkit | None = None,
) -> ExportReport:
    """Write a quantized model as a checkpoint, then verify it.

    Args:
        model: A quantized model.
        path: A directory that is empty or not there.
        format: Name of an export format; the best one for the model by default.
        verify: Whether to load the result in its client and compare.
        data: Batches from which the recorded probe takes its rows.
        allow_uncalibrated: Whether activation quantizers that saw no data are given the largest
            range of those like them (other experts); the model then computes with it, too.
        progress: Shows where long work is.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        ExportError: The format cannot hold the model, or a quantizer saw no data.
        OutputError: The directory cannot be used.
        VerificationError: What was written does not compute what the model does.
    """
    return toolkit_or_default(toolkit).export(
        model,
        path,
        format=format,
        verify=verify,
        data=data,
        allow_uncalibrated=allow_uncalibrated,
        progress=progress,
    )


def verify(
    path: str | Path, client: str | None = None, *, toolkit: Toolkit | None = None
) -> Verification:
    """Load a checkpoint in a client that is not ours and say what is wrong with it.

    Args:
        path: The checkpoint.
        client: Name of the client, where a format has several.
        toolkit: Plugins to use; all that are installed by default.

    Raises:
        VerificationError: It is no checkpoint, or no client can run here.
    """
    return toolkit_or_default(toolkit).verify(path, client)
