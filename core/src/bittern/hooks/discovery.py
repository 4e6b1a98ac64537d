"""Finds installed plugins, without importing them.

pluggy's own ``load_setuptools_entrypoints`` stops at the first broken plugin, drops a second one of
the same name in silence, and loads in the order of the file system; hence this file. Nor does it go
through ``importlib.metadata.entry_points()``, which one unreadable distribution, be it anybody's,
makes raise.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

__all__ = [
    "GROUP",
    "PluginOptions",
    "PluginRecord",
    "Status",
    "discover",
    "mark_duplicates",
]

GROUP = "bittern.plugins"
CORE = "bittern"
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Status(StrEnum):
    """What became of a plugin."""

    LOADED = "loaded"
    PARTIAL = "partial"
    BLOCKED = "blocked"
    TARGET_MISSING = "target-missing"
    TARGET_INCOMPATIBLE = "target-incompatible"
    CORE_INCOMPATIBLE = "core-incompatible"
    FAILED = "failed"
    DUPLICATE = "duplicate"
    FOUND = "found"


@dataclass(frozen=True, kw_only=True)
class PluginRecord:
    """One plugin and what became of it.

    Attributes:
        name: Entry-point name, the plugin's short name.
        distribution: Distribution name, or the path of an unpackaged plugin.
        version: Distribution version, ``""`` for an unpackaged plugin.
        entry: ``"package.hooks"``, the module that holds the hook implementations.
        status: What became of it.
        reason: Why, in words, where the status is not ``loaded``, or where nothing was registered.
        remedy: The command that mends it, where one is known.
        traceback: The traceback of a failed import.
        milliseconds: Time its import and registration took.
        hooks: Names of the hooks it implements.
        requirements: Requirement strings of its ``target`` extra.
        core: Requirement strings of its dependency on bittern.
    """

    name: str
    distribution: str
    version: str
    entry: str
    status: Status = Status.FOUND
    reason: str = ""
    remedy: str = ""
    traceback: str = ""
    milliseconds: float = 0.0
    hooks: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    core: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """``"distribution version"``."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def active(self) -> bool:
        """Whether its hooks are called."""
        return self.status in (Status.LOADED, Status.PARTIAL)

    def answers_to(self, names: Iterable[str]) -> bool:
        """Return whether one of ``names`` means this plugin, by name or by distribution."""
        mine = {canonicalize_name(self.name), canonicalize_name(self.distribution)}
        return any(name == "*" or canonicalize_name(name) in mine for name in names)


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Which plugins to load, and how.

    Attributes:
        allow: Only these, each asked for by name; ``None`` loads all that are installed.
        block: Never these; ``"*"`` blocks every installed plugin.
        files: Unpackaged plugins: paths of Python files.
        required: These must load; failing is an error.
        strict: Every plugin must load.
        trace: Show every hook call on stderr.
    """

    allow: tuple[str, ...] | None = None
    block: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    strict: bool = False
    trace: bool = False

    @classmethod
    def from_environment(cls) -> PluginOptions:
        """Read ``BITTERN_PLUGINS``, ``BITTERN_DISABLE_PLUGINS`` and their friends."""

        def names(variable: str) -> tuple[str, ...]:
            return tuple(n.strip() for n in os.environ.get(variable, "").split(",") if n.strip())

        def flag(variable: str) -> bool:
            value = os.environ.get(variable, "").strip().lower()
            return value not in ("", "0", "false", "no", "off")

        allow = names("BITTERN_PLUGINS")
        return cls(
            allow=allow or None,
            block=names("BITTERN_DISABLE_PLUGINS"),
            required=allow,
            strict=flag("BITTERN_STRICT_PLUGINS"),
            trace=flag("BITTERN_TRACE_PLUGINS"),
        )

    def merged(
        self,
        *,
        plugins: Iterable[str] | None = None,
        block: Iterable[str] = (),
        files: Iterable[str | Path] = (),
        strict: bool = False,
        trace: bool = False,
    ) -> PluginOptions:
        """Return these options with a caller's on top: what is asked for by name must load."""
        asked = None if plugins is None else tuple(plugins)
        return replace(
            self,
            allow=self.allow if asked is None else asked,
            required=self.required if asked is None else asked,
            block=(*self.block, *block),
            files=(*self.files, *(str(f) for f in files)),
            strict=self.strict or strict,
            trace=self.trace or trace,
        )


def discover() -> list[PluginRecord]:
    """Return the installed plugins, sorted by name.

    A distribution that ``importlib.metadata`` shows twice (an editable install's egg-info beside
    its dist-info) is one plugin. One whose metadata cannot be read is a failed plugin.
    """
    found: dict[tuple[str, str], PluginRecord] = {}
    for dist in importlib.metadata.distributions():
        for record in _plugins_of(dist):
            found.setdefault((canonicalize_name(record.distribution), record.name), record)
    return sorted(found.values(), key=lambda r: (r.name, r.distribution))


def _plugins_of(dist: importlib.metadata.Distribution) -> list[PluginRecord]:
    try:
        text = dist.read_text("entry_points.txt") or ""
    except (OSError, UnicodeDecodeError):
        return []  # nothing in it says that it is a plugin
    if GROUP not in text:
        return []
    name, version = _folder_name(dist)
    try:
        metadata: Any = dist.metadata  # parsed anew by each property of the distribution
        name, version = metadata["Name"] or name, metadata["Version"] or version
        requires = metadata.get_all("Requires-Dist") or dist.requires or ()  # egg-info has a file
        entries = [entry for entry in dist.entry_points if entry.group == GROUP]
    except Exception as error:  # the parsers of the standard library raise anything
        reason = f"its metadata cannot be read: {type(error).__name__}: {error}"
        remedy = f"pip install --force-reinstall {name}"
        return [
            PluginRecord(
                name=name,
                distribution=name,
                version=version,
                entry="",
                status=Status.FAILED,
                reason=reason,
                remedy=remedy,
            )
        ]
    requirements = _parsed(requires)
    return [
        _named_badly(
            PluginRecord(
                name=entry.name,
                distribution=name or entry.value,
                version=version,
                entry=entry.value.partition("[")[0].strip(),
                requirements=_target_requirements(requirements),
                core=_core_requirements(requirements),
            )
        )
        for entry in entries
    ]


def _folder_name(dist: importlib.metadata.Distribution) -> tuple[str, str]:
    """Return name and version as the name of the metadata folder has them."""
    stem = Path(str(getattr(dist, "_path", ""))).stem
    name, _, version = stem.partition("-")
    return name.replace("_", "-"), version


def _named_badly(record: PluginRecord) -> PluginRecord:
    """Return ``record`` as failed if its entry point names no module."""
    if MODULE.fullmatch(record.entry):
        return record
    return replace(
        record,
        status=Status.FAILED,
        reason=f'the entry point must name a module, as in {record.name} = "package.hooks", '
        f"and it names {record.entry!r}",
    )


def mark_duplicates(records: Iterable[PluginRecord]) -> list[PluginRecord]:
    """Return the records sorted by name; of those to be loaded, one per name and module stays."""
    marked: list[PluginRecord] = []
    names: dict[str, PluginRecord] = {}
    modules: dict[str, PluginRecord] = {}
    for record in sorted(records, key=lambda r: (r.name, r.distribution)):
        if record.status is not Status.FOUND:
            marked.append(record)
            continue
        taken, what = names.get(record.name), f"has the name {record.name!r}"
        if taken is None:
            taken, what = modules.get(record.entry), f"names the module {record.entry}"
        if taken is None:
            names[record.name] = modules[record.entry] = record
            marked.append(record)
            continue
        duplicate = replace(
            record,
            status=Status.DUPLICATE,
            reason=f"{taken.label} {what} too and was taken",
            remedy=f"pip uninstall {record.distribution}, or block {taken.distribution}",
        )
        marked.append(duplicate)
    return marked


def _parsed(requires: Iterable[str]) -> list[Requirement]:
    """Return the requirements that can be read; pip complains about the others."""
    found = []
    for text in requires:
        try:
            found.append(Requirement(text))
        except InvalidRequirement:
            continue
    return found


def _core_requirements(requirements: Iterable[Requirement]) -> tuple[str, ...]:
    return tuple(
        _bare(requirement)
        for requirement in requirements
        if canonicalize_name(requirement.name) == CORE
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    )


def _target_requirements(requirements: Iterable[Requirement]) -> tuple[str, ...]:
    return tuple(
        _bare(requirement)
        for requirement in requirements
        if (marker := requirement.marker) is not None
        and "extra" in str(marker)
        and marker.evaluate({"extra": "target"})
        and not marker.evaluate({"extra": ""})
    )


def _bare(requirement: Requirement) -> str:
    """Return a requirement without its marker."""
    return str(requirement).partition(";")[0].strip()
