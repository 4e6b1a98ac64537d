"""A Toolkit with exactly the plugins that a test gives it, whatever else is installed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from types import ModuleType, TracebackType
from typing import Any, Self

from bittern.builtin import hooks as builtin_hooks
from bittern.hooks import hookimpl
from bittern.hooks.discovery import GROUP, PluginOptions, PluginRecord, discover
from bittern.hooks.manager import PluginManager
from bittern.hooks.markers import PROJECT
from bittern.testing.site import Site
from bittern.toolkit import Toolkit

__all__ = ["PluginHarness", "hooks_module"]

_numbers = itertools.count()


def hooks_module(name: str, **hooks: Callable[..., Any]) -> ModuleType:
    """Make a plugin in memory.

    Args:
        name: The plugin's name.
        hooks: Hook name to implementation, as ``register_formats=lambda: [...]``.
    """
    module = ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, function if _marked(function) else hookimpl(function))
    return module


def _marked(value: object) -> bool:
    return getattr(value, f"{PROJECT}_impl", None) is not None


class PluginHarness:
    """An isolated set of plugins: in memory, by module name, or installed for the moment.

    ``with PluginHarness(my_hooks) as harness: harness.toolkit.quantize(...)``. Installed plugins
    and the environment are not looked at. What is added later counts from the next
    `manager` or `toolkit` on.

    Args:
        plugins: Hooks modules, objects with hook implementations as methods, names of modules
            (``"package.hooks"``), or records.
        builtin: Whether core's own rules are there too.
        options: Allow and block lists, strictness; nothing by default.
    """

    def __init__(
        self, *plugins: object, builtin: bool = True, options: PluginOptions | None = None
    ) -> None:
        self._builtin = builtin_hooks if builtin else None
        self._options = options if options is not None else PluginOptions()
        self._candidates: list[PluginRecord] = []
        self._modules: list[str] = []
        self._installed: set[str] = set()
        self._site: Site | None = None
        for plugin in plugins:
            self.add(plugin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Uninstall what was installed and forget the modules that were made."""
        for name in self._modules:
            sys.modules.pop(name, None)
        self._modules.clear()
        if self._site is not None:
            self._site.close()
            self._site = None

    # --- plugins ---

    def add(self, plugin: object, *, name: str | None = None, version: str = "1.0") -> PluginRecord:
        """Add a plugin that is no distribution.

        Args:
            plugin: A hooks module, an object with hook implementations, a module's name, a record.
            name: The plugin's name; the module's first part by default.
            version: Its version.

        Returns:
            The record it will be loaded from.
        """
        self._forget()
        if isinstance(plugin, PluginRecord):
            record = plugin
        elif isinstance(plugin, str):
            name = name or plugin.partition(".")[0]
            record = PluginRecord(name=name, distribution=name, version=version, entry=plugin)
        else:
            name = name or getattr(plugin, "__name__", type(plugin).__name__).rpartition(".")[2]
            entry = f"bittern_harness_{next(_numbers)}_{name}"
            sys.modules[entry] = _copy(plugin, entry)
            self._modules.append(entry)
            record = PluginRecord(
                name=name, distribution=f"bittern-{name}", version=version, entry=entry
            )
        self._candidates.append(record)
        return record

    def install(
        self,
        distribution: str,
        source: str,
        *,
        entry: str | None = None,
        version: str = "1.0",
        requires: Iterable[str] = (),
    ) -> PluginRecord:
        """Install a distribution with an entry point: broken, a duplicate, too new for this core.

        Args:
            distribution: Its name.
            source: The hooks module.
            entry: The plugin's name; the distribution's by default.
            version: Its version.
            requires: Requirements, as ``"bittern>=99"`` or ``'torch>=99; extra == "target"'``.

        Returns:
            The record as discovery finds it.
        """
        self._forget()
        if self._site is None:
            self._site = Site()
        module = f"bittern_installed_{next(_numbers)}_{distribution.replace('-', '_')}"
        self._site.add_module(module, source)
        self._site.add_distribution(
            distribution,
            version,
            requires=requires,
            entry_points={entry or distribution: module},
            group=GROUP,
        )
        self._installed.add(module)
        return next(record for record in discover() if record.entry == module)

    # --- what comes of them ---

    @cached_property
    def manager(self) -> PluginManager:
        """The loaded plugins.

        Raises:
            PluginError: The options ask for one that cannot be loaded.
        """
        found = [record for record in discover() if record.entry in self._installed]
        records = [replace(record) for record in (*self._candidates, *found)]
        return PluginManager(self._options, builtin=self._builtin, records=records)

    @cached_property
    def toolkit(self) -> Toolkit:
        """A Toolkit of these plugins."""
        return Toolkit(manager=self.manager)

    def record(self, name: str) -> PluginRecord:
        """Return what became of a plugin, by its name or its distribution's.

        Raises:
            KeyError: There is none, or several.
        """
        found = [record for record in self.manager.records if record.answers_to([name])]
        if len(found) != 1:
            known = ", ".join(record.label for record in self.manager.records)
            raise KeyError(f"{len(found)} plugins are called {name!r}; there are {known or 'none'}")
        return found[0]

    def _forget(self) -> None:
        for name in ("manager", "toolkit"):
            self.__dict__.pop(name, None)


def _copy(plugin: object, name: str) -> ModuleType:
    """Return a module with the hook implementations of a module or object."""
    module = ModuleType(name)
    for attribute in dir(plugin):
        value = getattr(plugin, attribute, None)
        if _marked(value):
            setattr(module, attribute, value)
    if hasattr(plugin, "target_modules"):
        module.target_modules = plugin.target_modules  # type: ignore[attr-defined]
    return module
