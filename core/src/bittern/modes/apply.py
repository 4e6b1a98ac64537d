"""Applies a mode to a model, and replays a stack of them on a fresh one."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from bittern.convert import modes_of, push_mode, remember, unwrapped
from bittern.convert.stack import CONVERSIONS
from bittern.errors import CheckpointError, PlanError, PluginError
from bittern.modes.context import ModeContext
from bittern.modes.names import how_to_get
from bittern.records import AppliedMode, Mode
from bittern.registry import NamedTable, nearest
from bittern.registry.targets import bound, resolve

__all__ = ["apply_mode", "check_next", "recorded", "replay"]


def apply_mode(
    model: nn.Module, name: str, options: Mapping[str, Any], context: ModeContext
) -> AppliedMode:
    """Convert a model by a mode, in place, and put the mode on its stack.

    Args:
        model: The model.
        name: Name of the mode.
        options: The mode's options.
        context: What the mode is given.

    Raises:
        PlanError: No such mode or option, or it may not follow what was applied before.
        PluginError: The mode returned something that no file can hold.
    """
    table = context.toolkit.registry.modes
    mode, plugin = table.get(name), table.plugin(name)
    config = _config(mode, options, plugin=plugin)
    check_next(modes_of(model), mode, table)
    model = unwrapped(model)  # names of modules are to be those of the model itself
    undo = remember(model)
    try:
        found = bound(mode.convert, plugin=plugin)(model, config, context)
        applied = AppliedMode(
            name=name,
            plugin=plugin,
            config=_plain(_options(config), what="config", mode=name, plugin=plugin),
            metadata=_plain(found or {}, what="metadata", mode=name, plugin=plugin),
        )
        push_mode(model, applied, exclusive=mode.exclusive)
    except BaseException:
        undo()
        raise
    return applied


def check_next(stack: Sequence[AppliedMode], mode: Mode, table: NamedTable[Mode]) -> None:
    """Raise if ``mode`` may not come on top of ``stack``.

    Raises:
        PlanError: A mode of the stack lets nothing follow, or not this one.
    """
    before = [m for m in stack if not (mode.exclusive and m.name == mode.name)]
    for applied in before:
        if applied.name not in table:
            continue
        follows = table.get(applied.name).next_modes
        if follows is not None and mode.name not in follows:
            may = f"only {', '.join(sorted(follows))} may follow" if follows else "nothing follows"
            raise PlanError(
                f"the mode {mode.name!r} cannot be applied after {applied.name!r}: {may}",
                hint=f"apply it before {applied.name!r}"
                + (", or bittern.revert(model) first" if applied.name in CONVERSIONS else ""),
            )


def recorded(model: nn.Module, table: NamedTable[Mode]) -> list[AppliedMode]:
    """Return the stack of a model with the metadata as it is now, for the manifest."""
    found = []
    for applied in modes_of(model):
        mode, plugin = table.get(applied.name), table.plugin(applied.name)
        now: Mapping[str, object] = {}
        if mode.metadata is not None:
            now = bound(mode.metadata, plugin=plugin)(model)
            now = _plain(now, what="metadata", mode=mode.name, plugin=plugin)
        found.append(dataclasses.replace(applied, metadata={**applied.metadata, **now}))
    return found


def replay(
    model: nn.Module, stack: Sequence[AppliedMode], context: ModeContext
) -> list[Callable[[], object]]:
    """Make the structure that a stack of modes makes, on a fresh model.

    Args:
        model: The model, changed in place.
        stack: The modes.
        context: What the modes are given.

    Returns:
        What has to be called when the tensors have been loaded.

    Raises:
        CheckpointError: A mode is unknown here.
    """
    table = context.toolkit.registry.modes
    for applied in stack:  # all of them before the first changes something
        if applied.name not in table:
            raise CheckpointError(
                f"it went through the mode {applied.name!r} of {applied.plugin}, and no loaded "
                "plugin has it",
                hint=how_to_get(applied.plugin),
            )
    later: list[Callable[[], object]] = []
    for applied in stack:
        mode, plugin = table.get(applied.name), table.plugin(applied.name)
        try:
            config = _config(mode, applied.config, plugin=plugin)
        except PlanError as error:
            raise CheckpointError(
                f"the mode {applied.name!r} of {applied.plugin} was applied with options that "
                f"{plugin} does not take: {error.what}",
                hint=how_to_get(applied.plugin, same=True),
            ) from error
        then = bound(mode.restore, plugin=plugin)(model, config, applied.metadata, context)
        push_mode(model, dataclasses.replace(applied, plugin=plugin), exclusive=mode.exclusive)
        if callable(then):
            later.append(then)
    return later


def _config(mode: Mode, options: Mapping[str, Any], *, plugin: str) -> Any:
    """Make the config of a mode from options."""
    if mode.config is None:
        if options:
            raise PlanError(
                f"the mode {mode.name!r} has no option {next(iter(options))!r}", hint="it has none"
            )
        return {}
    cls = resolve(mode.config, plugin=plugin)
    known = [f.name for f in dataclasses.fields(cls)]
    for name in options:
        if name not in known:
            near = nearest(name, known)
            raise PlanError(
                f"the mode {mode.name!r} has no option {name!r}",
                hint=f"did you mean {near[0]!r}? it has {', '.join(known)}"
                if near
                else "it has none",
            )
    try:
        inspect.signature(cls).bind(**options)
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"the mode {mode.name!r} cannot be applied with these options: {error}",
            hint=f"it has {', '.join(known)}",
        ) from error


def _options(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]


def _plain(data: Any, *, what: str, mode: str, plugin: str) -> Mapping[str, object]:
    """Return data as JSON gives it back, so that a mode sees the same before and after saving."""
    try:
        found = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"plugin {plugin}: the {what} of the mode {mode!r} is no plain data: {error}",
            hint="use numbers, strings, lists and dicts with string keys",
        ) from error
    if not isinstance(found, dict):
        raise PluginError(
            f"plugin {plugin}: the {what} of the mode {mode!r} is no mapping",
            hint="return a dict with string keys, or nothing",
        )
    return found
