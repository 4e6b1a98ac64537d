"""Loads plugins, keeps a record of what became of each, and calls their hooks."""

from __future__ import annotations

import importlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from bittern.errors import BitternError, PluginError
from bittern.hooks import specs
from bittern.hooks.attribution import Foreign, attribute
from bittern.hooks.compat import check_probes, check_requirements
from bittern.hooks.discovery import (
    PluginOptions,
    PluginRecord,
    Status,
    discover,
    mark_duplicates,
)
from bittern.hooks.files import file_record, load_file
from bittern.hooks.markers import PROJECT
from bittern.hooks.misfits import misfit, no_such_hook
from bittern.hooks.trace import traced

__all__ = ["BUILTIN", "PluginManager"]

BUILTIN = "bittern"

log = logging.getLogger("bittern.plugins")


class PluginManager:
    """The plugins of one Toolkit.

    Loading never raises and is never silent: every plugin has a `PluginRecord`. It raises only
    for a plugin that was asked for by name, or when ``options.strict`` is set.

    Args:
        options: Which plugins to load.
        builtin: The module with core's own hook implementations.
        records: Candidates; ``None`` discovers what is installed.
        lenient: Whether a plugin that was asked for may be missing or broken, for a report on it.

    Raises:
        PluginError: A plugin that was asked for by name cannot be loaded.
    """

    def __init__(
        self,
        options: PluginOptions | None = None,
        *,
        builtin: ModuleType | None = None,
        records: Iterable[PluginRecord] | None = None,
        lenient: bool = False,
    ) -> None:
        self.options = options if options is not None else PluginOptions.from_environment()
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(specs)
        self._records: dict[tuple[str, str], PluginRecord] = {}
        self._versions: dict[str, str | None] = {}
        if builtin is not None:
            self._pm.register(builtin, name=BUILTIN)
            for caller in self._pm.get_hookcallers(builtin) or ():
                self._trace(builtin, caller, BUILTIN)
        found = [self._chosen(r) for r in (discover() if records is None else records)]
        # pluggy calls the last registered first: register in reverse, so that calls go by name.
        for record in reversed(mark_duplicates(found)):
            self._keep(self._load(record))
        for file in {Path(file).resolve(): Path(file) for file in self.options.files}.values():
            self._keep(self._load_file(file, lenient=lenient))
        if not lenient:
            self._require(self.options.required)

    # --- loading ---

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """Every plugin that was found, sorted by name."""
        return tuple(sorted(self._records.values(), key=lambda r: (r.name, r.distribution)))

    def _keep(self, record: PluginRecord) -> None:
        self._records[record.name, record.distribution] = record
        if record.status is Status.FAILED:
            log.warning("plugin %s failed to load: %s", record.label, record.reason)

    def _chosen(self, record: PluginRecord) -> PluginRecord:
        if record.answers_to(self.options.block):
            return replace(record, status=Status.BLOCKED, reason="blocked by name")
        if self.options.allow is not None and not record.answers_to(self.options.allow):
            return replace(
                record, status=Status.BLOCKED, reason="not in the list of allowed plugins"
            )
        return record

    def _load(self, record: PluginRecord) -> PluginRecord:
        if record.status is not Status.FOUND:
            return record
        record = check_requirements(record, versions=self._versions)
        if record.status is not Status.FOUND:
            return record
        return self._import(record, lambda: importlib.import_module(record.entry))

    def _load_file(self, path: Path, *, lenient: bool) -> PluginRecord:
        record = file_record(path)
        record = self._import(record, lambda: load_file(record, path))
        if not record.active and not lenient:
            raise PluginError(
                f"the plugin file {path} could not be loaded: {record.reason}",
                hint="fix the file, or leave out --plugin",
            )
        return record

    def _import(self, record: PluginRecord, load: Callable[[], ModuleType]) -> PluginRecord:
        start = time.perf_counter()
        module = None
        try:
            module = load()
            record = check_probes(record, getattr(module, "target_modules", ()))
            if record.status is Status.FOUND:
                record = self._register(record, module)
        except (Exception, SystemExit) as error:
            # Whatever a plugin does, sys.exit() included, must not cost anybody else anything.
            record = replace(
                record,
                status=Status.FAILED,
                reason=misfit(module, error) or f"{type(error).__name__}: {error}",
                traceback=traceback.format_exc(),
                remedy=f"pip install -U {record.distribution}" if record.version else "",
            )
        return replace(record, milliseconds=(time.perf_counter() - start) * 1e3)

    def _register(self, record: PluginRecord, module: ModuleType) -> PluginRecord:
        self._pm.register(module, name=f"{record.name}@{record.distribution}")
        names: list[str] = []
        unknown: list[str] = []
        for caller in self._pm.get_hookcallers(module) or ():
            mine = [impl for impl in caller.get_hookimpls() if impl.plugin is module]
            if not caller.has_spec():
                unknown += [caller.name for impl in mine[:1] if not impl.optionalhook]
                continue
            names.append(caller.name)
            for impl in mine:
                impl.function = attribute(  # type: ignore[misc]
                    impl.function,
                    label=record.label,
                    name=record.name,
                    hook=caller.name,
                    wrapper=impl.wrapper or impl.hookwrapper,
                    old=impl.hookwrapper,
                )
            self._trace(module, caller, record.name)
        if unknown:
            return replace(
                record,
                status=Status.PARTIAL,
                hooks=tuple(sorted(names)),
                reason="; ".join(map(no_such_hook, sorted(unknown))),
                remedy="pip install -U bittern",
            )
        silent = (
            "" if names else f"{record.entry} has no function decorated with bittern.hooks.hookimpl"
        )
        return replace(record, status=Status.LOADED, hooks=tuple(sorted(names)), reason=silent)

    def _trace(self, module: ModuleType, caller: Any, name: str) -> None:
        """Show the calls of a module's implementations, if the options say so."""
        for impl in caller.get_hookimpls() if self.options.trace else ():
            if impl.plugin is module:
                impl.function = traced(
                    impl.function,
                    name=name,
                    hook=caller.name,
                    arguments=impl.argnames,
                    wrapper=impl.wrapper or impl.hookwrapper,
                    sink=sys.stderr.write,
                )

    def _require(self, names: Iterable[str]) -> None:
        for name in names:
            matching = [r for r in self.records if r.answers_to([name])]
            if not matching:
                raise PluginError(
                    f"the plugin {name!r} is not installed",
                    hint=f"pip install bittern-{name}"
                    if "-" not in name
                    else f"pip install {name}",
                )
            if not any(r.status is Status.LOADED for r in matching):
                raise self._unusable(min(matching, key=lambda r: r.status is Status.BLOCKED))
        if self.options.strict:
            for record in self.records:
                if record.status not in (Status.LOADED, Status.BLOCKED):
                    raise self._unusable(record)

    def require(self, names: Iterable[str]) -> None:
        """Raise `PluginError` unless all of ``names`` are loaded (a recipe's ``requires``)."""
        self._require(tuple(names))

    @staticmethod
    def _unusable(record: PluginRecord) -> PluginError:
        return PluginError(
            f"plugin {record.label} is {record.status}: {record.reason}",
            hint=record.remedy or None,
        )

    # --- calling ---

    def collect(self, hook: str, **arguments: Any) -> Iterator[tuple[Any, str, bool]]:
        """Call every implementation of a hook that returns records.

        Yields:
            ``(record, plugin label, is builtin)``, builtin first, then plugins by name.

        Raises:
            PluginError: An implementation failed, or returned something else than its records.
        """
        impls = getattr(self._pm.hook, hook).get_hookimpls()
        for impl in sorted(impls, key=lambda i: (i.plugin_name != BUILTIN, i.plugin_name)):
            label, builtin = self._who(impl.plugin_name)
            result = impl.function(*(arguments[name] for name in impl.argnames))
            for item in result or ():
                yield item, label, builtin

    def first(self, hook: str, **arguments: Any) -> Any:
        """Call a ``resolve_*`` or ``run_*`` hook: the first answer that is not ``None``.

        What fails in a function that was handed to the plugins is not blamed on them.
        """
        foreign = Foreign()
        given = {name: foreign.watch(value) for name, value in arguments.items()}
        try:
            return getattr(self._pm.hook, hook)(**given)
        except BitternError as error:
            inner = foreign.original(error)
            if inner is None or inner is error:
                raise
        raise inner

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a hook whose results do not matter."""
        getattr(self._pm.hook, hook)(**arguments)

    def notify_each(self, hook: str, **arguments: Any) -> tuple[tuple[str, Exception], ...]:
        """Call every implementation of a hook, also those after one that failed.

        Returns:
            ``(plugin label, error)`` of those that failed.
        """
        failures: list[tuple[str, Exception]] = []
        for impl in reversed(getattr(self._pm.hook, hook).get_hookimpls()):
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except Exception as error:
                failures.append((self._who(impl.plugin_name)[0], error))
        return tuple(failures)

    def implementations(self, hook: str) -> tuple[str, ...]:
        """Return the labels of the plugins that implement ``hook``."""
        impls = getattr(self._pm.hook, hook).get_hookimpls()
        return tuple(self._who(impl.plugin_name)[0] for impl in impls)

    def intercept(self, around: Callable[..., Callable[..., Any]]) -> Callable[[], None]:
        """Put a function around every implementation, as `bittern.testing.HookRecorder` does.

        Args:
            around: Called as ``around(function, hook=, plugin=, names=, wrapper=)`` with the
                implementation, the hook's name, the plugin's label, the names of the positional
                arguments, and whether it is a hook wrapper; returns the function to call instead.

        Returns:
            A function that undoes it.
        """
        before: list[tuple[Any, Any]] = []
        for hook, spec in sorted(vars(specs).items()):
            if getattr(spec, f"{PROJECT}_spec", None) is None:
                continue
            for impl in getattr(self._pm.hook, hook).get_hookimpls():
                before.append((impl, impl.function))
                impl.function = around(
                    impl.function,
                    hook=hook,
                    plugin=self._who(impl.plugin_name)[0],
                    names=impl.argnames,
                    wrapper=impl.wrapper or impl.hookwrapper,
                )

        def undo() -> None:
            for impl, function in before:
                impl.function = function

        return undo

    def _who(self, key: str) -> tuple[str, bool]:
        if key == BUILTIN:
            return BUILTIN, True
        name, _, distribution = key.partition("@")
        record = self._records.get((name, distribution))
        return (record.label if record is not None else key), False
