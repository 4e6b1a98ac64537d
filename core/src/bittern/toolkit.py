"""The Toolkit: plugins + registry, and the one place where the steps are put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.hooks.discovery import PluginOptions
from bittern.hooks.manager import PluginManager
from bittern.registry.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from bittern.config import Recipe, RecipeLike
    from bittern.exporting import ExportContext
    from bittern.modes import ModeContext
    from bittern.records import (
        AppliedMode,
        CalibrationSummary,
        DataConfig,
        Evaluation,
        Exporter,
        ExportReport,
        LoadConfig,
        ModelAdapter,
        ModuleRule,
        Plan,
        Verification,
    )
    from bittern.registry.modules import ClassTable
    from bittern.report import Result
    from bittern.runtime import Data, Progress
    from bittern.search import SearchResult
    from bittern.tracing import GraphCollection, SymMap, Trace

__all__ = ["Toolkit", "default_toolkit", "toolkit_or_default"]


class Toolkit:
    """A set of plugins and everything they registered.

    Args:
        plugins: Names of the plugins to use, each of which must load; ``None`` uses all that are
            installed.
        block: Names of plugins to leave out; ``"*"`` leaves out all.
        files: Unpackaged plugins, as paths of Python files.
        strict: Whether every installed plugin must load.
        trace: Whether every hook call is shown on stderr.
        manager: A ready manager instead, as the tests of plugins use.

    Raises:
        PluginError: A plugin that was asked for by name cannot be loaded.
    """

    def __init__(
        self,
        *,
        plugins: Iterable[str] | None = None,
        block: Iterable[str] = (),
        files: Iterable[str | Path] = (),
        strict: bool = False,
        trace: bool = False,
        manager: PluginManager | None = None,
    ) -> None:
        if manager is None:
            from bittern.builtin import hooks as builtin

            options = PluginOptions.from_environment().merged(
                plugins=plugins, block=block, files=files, strict=strict, trace=trace
            )
            manager = PluginManager(options, builtin=builtin)
        self.plugins = manager

    @cached_property
    def registry(self) -> Registry:
        """What the plugins registered; each table is collected on first use."""
        return Registry(self.plugins)

    # --- resolution ---

    def adapter(self, model: nn.Module) -> ModelAdapter:
        """Return what the model's framework knows about it; nothing for a plain model."""
        from bittern.records import ModelAdapter

        found = self.plugins.first("resolve_model_adapter", model=model)
        return found if found is not None else ModelAdapter()

    def rules(self, model: nn.Module) -> ClassTable[ModuleRule]:
        """Return the module rules, those that only the live model shows included."""
        return self.registry.modules.extended(self.plugins.collect("discover_modules", model=model))

    def access(self, module: nn.Module, *, write: bool) -> AbstractContextManager[None]:
        """Return a context manager within which the module's weights are real tensors."""
        from bittern.runtime.access import resident

        found = self.plugins.first("resolve_weight_access", module=module, write=write)
        return found if found is not None else resident(module, write=write)

    def recipe(self, recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
        """Return a whole recipe; plugins it requires must be loaded."""
        from bittern.config import load_recipe

        found = load_recipe(recipe, lookup=self.registry.recipes.get, overrides=overrides)
        self.plugins.require(found.requires)
        return found

    def load(self, source: str, config: LoadConfig | None = None) -> nn.Module:
        """Load a model that a plugin knows how to load.

        Raises:
            ModelError: No plugin takes the source.
        """
        from bittern.errors import ModelError
        from bittern.records import LoadConfig

        config = config if config is not None else LoadConfig()
        found = self.plugins.first("resolve_model", source=source, config=config, toolkit=self)
        if found is None:
            loaders = self.plugins.implementations("resolve_model")
            looks_like_path = source.startswith((".", "/", "~")) or source.endswith("/")
            missing = looks_like_path and not Path(source).exists()
            raise ModelError(
                "there is no such directory" if missing else "no plugin can load this model",
                where=source,
                hint="check the path"
                if missing
                else f"plugins that load models: {', '.join(loaders)}"
                if loaders
                else "pip install 'bittern-huggingface[target]'",
            )
        return found  # type: ignore[no-any-return]

    def data(self, source: Any, model: nn.Module, config: DataConfig | None = None) -> Any:
        """Turn a path or name into batches; anything else is taken to be data already.

        Raises:
            DataError: No plugin takes the source.
        """
        from bittern.errors import DataError
        from bittern.records import DataConfig

        if source is None:
            raise DataError("there is no data", hint="give batches, or a path")
        if not isinstance(source, str | Path):
            return source
        config = config if config is not None else DataConfig()
        found = self.plugins.first(
            "resolve_calibration_data", source=str(source), model=model, config=config
        )
        if found is None:
            raise DataError(
                "no plugin can read this data",
                where=str(source),
                hint=".txt, .jsonl, .npy and `datasets` specs need bittern-huggingface",
            )
        return found

    # --- the steps ---

    def trace(self, model: nn.Module, example_inputs: Any = None) -> Trace:
        """Run a model once on example inputs and find which of its tensors belong together."""
        from bittern.errors import TraceError

        adapter = self.adapter(model)
        args: tuple[Any, ...] = ()
        kwargs: Mapping[str, Any] = {}
        if isinstance(example_inputs, Mapping):
            kwargs = example_inputs
        elif example_inputs is not None:
            several = isinstance(example_inputs, tuple | list)
            args = tuple(example_inputs) if several else (example_inputs,)
        elif adapter.example_inputs is not None:
            kwargs = adapter.example_inputs()
        else:
            raise TraceError(
                "no plugin knows inputs for this model",
                hint="give example_inputs: a tensor, a tuple, or a dict of arguments",
            )
        return self._trace(model, args, {**adapter.call_kwargs, **kwargs})

    def recursive_trace(
        self, model: nn.Module, concrete_args: Mapping[str, Any] | None = None
    ) -> GraphCollection:
        """Trace a model with torch.fx, and every module that cannot be traced on its own."""
        from bittern.tracing import recursive_trace

        return recursive_trace(model, concrete_args, leaves=self.registry.leaves)

    def analyze_symbols(
        self, model: nn.Module, concrete_args: Mapping[str, Any] | None = None
    ) -> SymMap:
        """Say of every width whether it may change, and what changes along."""
        from bittern.tracing import analyze_symbols

        rules = self.registry
        return analyze_symbols(model, concrete_args, rules=rules.symbols, leaves=rules.leaves)

    def plan(self, model: nn.Module, recipe: RecipeLike, *, overrides: Sequence[str] = ()) -> Plan:
        """Decide who is quantized how; change nothing."""
        from bittern.planning import build_plan

        whole = self.recipe(recipe, overrides)
        rules = self.rules(model)
        return build_plan(model, whole, self.registry, adapter=self.adapter(model), modules=rules)

    def convert(self, model: nn.Module, plan: Plan) -> None:
        """Swap classes and attach quantizers, in place."""
        from bittern.convert import convert, modes_of
        from bittern.modes.apply import check_next

        if before := modes_of(model):
            modes = self.registry.modes
            check_next(before, modes.get("quantize"), modes)
        convert(model, plan, self.registry)
        self.plugins.notify("after_convert", model=model, plan=plan)

    def calibrate(
        self,
        model: nn.Module,
        plan: Plan,
        data: Data | None,
        *,
        layerwise: bool = False,
        work_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> CalibrationSummary:
        """Run the plan's algorithms."""
        from bittern.calibration import run_calibration
        from bittern.convert import amend_mode
        from bittern.runtime import SILENT

        summary = run_calibration(
            model,
            plan,
            data,
            registry=self.registry,
            adapter=self.adapter(model),
            access=self.access,
            wrap=partial(self.plugins.first, "run_calibration", model=model, plan=plan),
            trace=lambda args, kwargs: self._trace(model, args, kwargs),
            layerwise=layerwise,
            work_dir=work_dir,
            versions={r.name: r.version for r in self.plugins.records},
            progress=progress if progress is not None else SILENT,
        )
        seen = {"batches": summary.batches, "data": summary.data}
        amend_mode(model, "quantize", metadata={"calibration": seen})
        return summary

    def _trace(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
        from bittern.nn import quantizers_off
        from bittern.tracing.trace import run_trace

        rules = self.registry
        with quantizers_off(model):
            return run_trace(
                model, args, kwargs, ops=rules.ops, leaves=rules.leaves, symbols=rules.symbols
            )

    def quantize(
        self,
        model: nn.Module,
        recipe: RecipeLike | Plan,
        data: Data | str | Path | None = None,
        *,
        overrides: Sequence[str] = (),
        config: DataConfig | None = None,
        layerwise: bool = False,
        work_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Plan, convert and calibrate; on an error the model is what it was."""
        from dataclasses import asdict

        from bittern.convert import amend_mode, remember
        from bittern.records import Plan
        from bittern.report import Report, Result

        if isinstance(recipe, Plan):
            plan = recipe
        else:
            plan = self.plan(model, recipe, overrides=overrides)
        batches = self.data(data, model, config) if data is not None else None
        undo = remember(model)
        try:
            self.convert(model, plan)
            summary = self.calibrate(
                model, plan, batches, layerwise=layerwise, work_dir=work_dir, progress=progress
            )
            said = {} if config is None else {"data": asdict(config)}
            amend_mode(model, "quantize", config={"overrides": list(overrides)}, metadata=said)
        except BaseException:
            undo()
            raise
        return Result(model=model, plan=plan, report=Report(plan=plan, calibration=summary))

    def auto_quantize(
        self, model: nn.Module, candidates: Any, data: Any, **options: Any
    ) -> SearchResult:
        """Find which part of a model gets which recipe, and quantize it so."""
        from bittern.search import run_search

        return run_search(model, candidates, data, steps=self, **options)

    def evaluate(
        self,
        model: nn.Module,
        data: Any,
        *,
        config: DataConfig | None = None,
        reference: bool = True,
        layers: bool = True,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Measure perplexity or accuracy, KL and SQNR."""
        from bittern.evaluation import run_evaluation
        from bittern.runtime import SILENT

        return run_evaluation(
            model,
            self.data(data, model, config),
            adapter=self.adapter(model),
            reference=reference,
            layers=layers,
            progress=progress if progress is not None else SILENT,
        )

    # --- export ---

    def exporter(self, model: nn.Module, format: str | None = None) -> Exporter:
        """Return the exporter called ``format``, or the best one for the model."""
        from bittern.exporting import choose_exporter

        return choose_exporter(model, self.registry, format)

    def export_context(
        self, model: nn.Module, plan: Plan, progress: Progress | None = None
    ) -> ExportContext:
        """Return what an exporter is given."""
        from bittern.exporting import ExportContext
        from bittern.runtime import SILENT

        return ExportContext(
            plan=plan,
            adapter=self.adapter(model),
            access=self.access,
            progress=progress if progress is not None else SILENT,
        )

    def check_export(self, model: nn.Module, plan: Plan, format: str | None = None) -> Exporter:
        """Refuse a plan that the format's client cannot load, before anything is computed."""
        from bittern.exporting import check_export

        exporter = self.exporter(model, format)
        check_export(exporter, model, self.export_context(model, plan), self.registry)
        return exporter

    def export(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        format: str | None = None,
        verify: bool = True,
        data: Any = None,
        allow_uncalibrated: bool = False,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write a checkpoint, then verify it."""
        from bittern.calibration.coverage import borrow_ranges
        from bittern.convert import plan_of
        from bittern.errors import VerificationError
        from bittern.exporting import run_export

        plan = plan_of(model)
        if allow_uncalibrated:
            borrow_ranges(model)
        report = run_export(
            self.exporter(model, format),
            model,
            Path(path),
            self.export_context(model, plan, progress),
            self.registry,
            data=data,
            after=lambda report, stage: self.plugins.notify(
                "after_export", report=report, path=stage
            ),
        )
        if verify:
            verdict = self.verify(path)
            if not verdict.ok:
                first = verdict.findings[0]
                raise VerificationError(
                    f"{first.tensor_or_field}: {first.problem} "
                    f"({len(verdict.findings)} findings in all)",
                    where=str(path),
                    hint=first.remedy,
                )
        return report

    # --- state ---

    def apply_mode(
        self,
        model: nn.Module,
        mode: str,
        config: Mapping[str, Any] | None = None,
        *,
        data: Data | str | Path | None = None,
        data_config: DataConfig | None = None,
        progress: Progress | None = None,
    ) -> AppliedMode:
        """Apply a mode to a model and put it on the model's stack."""
        from bittern.modes import apply_mode

        context = self._modes(model, data, data_config, progress)
        return apply_mode(model, mode, config if config is not None else {}, context)

    def _modes(
        self,
        model: nn.Module,
        data: Data | str | Path | None = None,
        config: DataConfig | None = None,
        progress: Progress | None = None,
    ) -> ModeContext:
        from dataclasses import asdict

        from bittern.modes import ModeContext
        from bittern.runtime import SILENT

        return ModeContext(
            toolkit=self,
            data=self.data(data, model, config) if data is not None else None,
            data_config=None if config is None else asdict(config),
            progress=progress if progress is not None else SILENT,
        )

    def save(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        state_only: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Save what was done to a model, and its tensors."""
        from bittern.checkpoint import save_state

        io = self.plugins.first("resolve_checkpoint_io", model=model, path=Path(path))
        save_state(
            model,
            Path(path),
            modes=self.registry.modes,
            io=io,
            state_only=state_only,
            replace=overwrite,
        )

    def restore(self, model: nn.Module, path: str | Path) -> None:
        """Restore a saved state into a fresh model."""
        from bittern.checkpoint import restore_state

        restore_state(
            model,
            Path(path),
            self._modes(model),
            resolve_io=lambda: self.plugins.first(
                "resolve_checkpoint_io", model=model, path=Path(path)
            ),
        )

    def verify(self, path: str | Path, client: str | None = None) -> Verification:
        """Load a checkpoint in its client and compare it with what was recorded."""
        from bittern.exporting.verify import run_verification

        return run_verification(Path(path), self.registry, client=client)


@cache
def default_toolkit() -> Toolkit:
    """Return the Toolkit of the plain functions, made on first use from the environment."""
    return Toolkit()


def toolkit_or_default(toolkit: Toolkit | None) -> Toolkit:
    """Return a Toolkit, the default one for ``None``."""
    return toolkit if toolkit is not None else default_toolkit()
