"""The mode ``quantize``: plan, convert, calibrate; and a plan made again from the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bittern.convert import LiveNames, modes_of, plan_of, unwrapped
from bittern.errors import BitternError, CheckpointError
from bittern.modes.context import ModeContext
from bittern.modes.names import how_to_get
from bittern.nn import original_class
from bittern.nn.computed import weight_of
from bittern.planning import slots_of
from bittern.planning.plain import spec_from, spec_to
from bittern.records import Plan, PlanEntry
from bittern.registry import Match
from bittern.registry.targets import bound

__all__ = ["QuantizeConfig", "convert", "metadata", "restore"]


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Options of the mode ``quantize``.

    Attributes:
        recipe: A recipe's name, YAML file or data.
        overrides: ``"dotted.path=value"`` on top of it.
    """

    recipe: Any
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.recipe, Path):
            object.__setattr__(self, "recipe", str(self.recipe))


def convert(model: nn.Module, config: QuantizeConfig, context: ModeContext) -> dict[str, object]:
    """Quantize a model in place."""
    steps = context.toolkit
    plan = steps.plan(model, config.recipe, overrides=tuple(config.overrides))
    steps.convert(model, plan)
    steps.calibrate(model, plan, context.data, progress=context.progress)
    found = modes_of(model)[-1].metadata
    return {**found} if context.data_config is None else {**found, "data": context.data_config}


def metadata(model: nn.Module) -> dict[str, Any]:
    """Return a quantized model's plan as plain data."""
    plan, names = plan_of(model), LiveNames(unwrapped(model))
    return {
        "recipe": plan.recipe,
        "entries": [
            {
                "module": names.saved(entry.module),
                "slot": entry.slot,
                "spec": spec_to(entry.spec),
                "rule": entry.rule,
                "plugin": entry.plugin,
            }
            for entry in plan.entries
        ],
        "algorithm": [[name, dict(options)] for name, options in plan.algorithm],
        "skipped": {names.saved(path): reason for path, reason in plan.skipped.items()},
    }


def restore(
    model: nn.Module, config: QuantizeConfig, data: Mapping[str, Any], context: ModeContext
) -> Callable[[], None]:
    """Convert a model as a saved one was.

    Raises:
        CheckpointError: The metadata is malformed, needs a plugin that is missing, or is of
            another model.
    """
    try:
        plan = _plan(model, data, context)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"malformed plan: {error!r}", hint="copy or download the whole directory again"
        ) from error
    context.toolkit.convert(model, plan)

    def finish() -> None:
        table = context.toolkit.registry.algorithms
        for name, _ in plan.algorithm:
            if name in table and (step := table.get(name)).restore:
                bound(step.restore, plugin=table.plugin(name))(model)

    return finish


def _plan(model: nn.Module, data: Mapping[str, Any], context: ModeContext) -> Plan:
    registry = context.toolkit.registry
    rules = context.toolkit.rules(model)
    live = dict(model.named_modules())
    names = LiveNames(model)
    entries: list[PlanEntry] = []
    classes: dict[str, str] = {}
    for entry in data["entries"]:
        path = names.live(entry["module"])
        if path not in live:
            raise CheckpointError(
                f"it quantizes {entry['module']!r}, which this model does not have",
                hint="restore into a model of the same architecture",
            )
        module = live[path]
        match = rules.find(module, original_class(module))
        if not isinstance(match, Match) or match.rule.quantized is None:
            raise _missing(entry)
        slot = next((s for s in slots_of(match, module) if s.name == entry["slot"]), None)
        if slot is None:
            raise _missing(entry)
        try:
            spec = spec_from(entry["spec"], registry.formats)
        except BitternError as error:
            raise CheckpointError(error.what, where=entry["module"], hint=error.hint) from error
        tensor = weight_of(module, slot.tensor or slot.name) if slot.kind == "weight" else None
        entries.append(
            PlanEntry(
                module=path,
                slot=entry["slot"],
                spec=spec,
                rule=match.rule.target,
                plugin=match.plugin,
                kind=slot.kind,
                slot_rule=slot,
                shape=tuple(tensor.shape) if isinstance(tensor, Tensor) else None,
            )
        )
        classes[path] = match.rule.quantized
    return Plan(
        recipe=data["recipe"],
        entries=tuple(entries),
        skipped={names.live(path): str(why) for path, why in data.get("skipped", {}).items()},
        algorithm=tuple((str(name), dict(options)) for name, options in data["algorithm"]),
        classes=classes,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _missing(entry: Mapping[str, Any]) -> CheckpointError:
    return CheckpointError(
        f"{entry['module']} was quantized by the rule of {entry['plugin']} for {entry['rule']}, "
        "and no loaded plugin has one for it",
        hint=how_to_get(str(entry["plugin"])),
    )
