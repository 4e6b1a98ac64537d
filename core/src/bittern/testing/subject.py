"""The plugin under test: its hooks module, its records, and a Toolkit of it and core alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import pytest

from bittern.builtin import hooks as builtin_hooks
from bittern.hooks import specs
from bittern.hooks.discovery import PluginOptions, PluginRecord, Status, discover
from bittern.hooks.manager import BUILTIN, PluginManager
from bittern.hooks.markers import PROJECT
from bittern.toolkit import Toolkit

__all__ = ["CORE_HOOKS", "IMPORTS", "TARGETED", "Subject", "subject_of"]

CORE_HOOKS = "bittern.builtin.hooks"

# Records with a target class, and the fields of records that hold import strings.
TARGETED = ("register_modules", "register_symbols", "register_trace_leaves")
IMPORTS = {
    "register_modules": ("quantized",),
    "register_symbols": ("symbols",),
    "register_trace_ops": ("flow",),
    "register_formats": ("codec",),
    "register_algorithms": ("run",),
    "register_modes": ("convert", "restore", "config", "metadata"),
    "register_exporters": ("write", "verify", "check", "accepts"),
    "register_kernels": ("impl",),
}


@dataclass(frozen=True)
class Subject:
    """One plugin as the conformance tests see it.

    Attributes:
        candidate: The record before loading; for core's own rules a made-up one.
        installed: Whether a distribution with an entry point provides it.
    """

    candidate: PluginRecord
    installed: bool

    @property
    def is_core(self) -> bool:
        """Whether these are core's own rules."""
        return self.candidate.entry == CORE_HOOKS

    @property
    def label(self) -> str:
        """The label that plans and errors show."""
        return BUILTIN if self.is_core else self.candidate.label

    # --- without loading ---

    @cached_property
    def module(self) -> ModuleType:
        """The hooks module."""
        return importlib.import_module(self.candidate.entry)

    @cached_property
    def implementations(self) -> dict[str, Callable[..., Any]]:
        """Hook name to implementation, wrappers included."""
        found: dict[str, Callable[..., Any]] = {}
        for name in dir(self.module):
            value = getattr(self.module, name, None)
            options = getattr(value, f"{PROJECT}_impl", None)
            if isinstance(options, dict):
                found[options.get("specname") or name] = value  # type: ignore[assignment]
        return found

    def call(self, hook: str) -> list[Any]:
        """Call the plugin's ``register_*`` hook; nothing where it has none."""
        function = self.implementations.get(hook)
        result = function() if function is not None else None
        if result is None:
            return []
        return list(result) if isinstance(result, Iterable) else [result]

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield ``(hook, record)`` of everything the plugin registers."""
        for hook in specs.RETURNS:
            if hook.startswith("register_"):
                for record in self.call(hook):
                    yield hook, record

    def targets(self) -> list[str]:
        """Return the target strings of the plugin's rules, each once."""
        found = [r.target for hook, r in self.records() if hook in TARGETED]
        return list(dict.fromkeys(found))

    def imports(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(hook, field, import string)`` of every record."""
        for hook, record in self.records():
            for name in IMPORTS.get(hook, ()):
                value = getattr(record, name)
                if value is not None:
                    yield hook, name, value

    # --- loaded ---

    def manager(self, options: PluginOptions | None = None) -> PluginManager:
        """Return core and this plugin alone."""
        return PluginManager(
            options if options is not None else PluginOptions(),
            builtin=builtin_hooks,
            records=() if self.is_core else (self.candidate,),
        )

    @cached_property
    def record(self) -> PluginRecord:
        """What loading made of the plugin."""
        return self.candidate if self.is_core else self._manager.records[0]

    @cached_property
    def _manager(self) -> PluginManager:
        return self.manager()

    @cached_property
    def toolkit(self) -> Toolkit:
        """A Toolkit of core and this plugin.

        Skips the test where the plugin is not loaded, which `PluginConformance` judges.
        """
        self.need_loaded()
        return Toolkit(manager=self._manager)

    def need_loaded(self) -> None:
        """Skip the test where the plugin is not loaded: its framework may be absent here."""
        record = self.record
        if not self.is_core and not record.active:
            pytest.skip(f"{record.label} is {record.status}: {record.reason}")

    @property
    def target_absent(self) -> bool:
        """Whether the plugin's framework is missing on this machine."""
        missing = (Status.TARGET_MISSING, Status.TARGET_INCOMPATIBLE)
        return not self.is_core and self.record.status in missing


def subject_of(plugin: str, hooks: str) -> Subject:
    """Return the plugin called ``plugin``, or the one with the hooks module ``hooks``.

    Raises:
        AssertionError: It is not installed, or nothing was named.
    """
    if hooks == CORE_HOOKS:
        record = PluginRecord(name=BUILTIN, distribution=BUILTIN, version="", entry=hooks)
        return Subject(record, installed=False)
    for record in discover():
        if (plugin and record.answers_to([plugin])) or (hooks and record.entry == hooks):
            return Subject(record, installed=True)
    if plugin and not hooks:
        raise AssertionError(
            f"no installed distribution has a plugin {plugin!r}; pip install -e your plugin, or "
            'give the hooks module: hooks = "package.hooks"'
        )
    if not hooks:
        raise AssertionError(
            'say which plugin is tested: plugin = "name" or hooks = "package.hooks"'
        )
    name = plugin or hooks.partition(".")[0]
    record = PluginRecord(name=name, distribution=name, version="", entry=hooks)
    return Subject(record, installed=False)
