"""Finds installed plugins and checks what they need, without importing them.

pluggy's own ``load_setuptools_entrypoints`` stops at the first broken plugin, drops a second one of
the same name in silence, and loads in the order of the file system; hence this file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from bittern._version import __version__

__all__ = [
    "GROUP",
    "PluginOptions",
    "PluginRecord",
    "Status",
    "check_probes",
    "check_requirements",
    "discover",
    "mark_duplicates",
]

GROUP = "bittern.plugins"
CORE = "bittern"


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
        reason: Why, in words, where the status is not ``loaded``.
        remedy: The command that mends it, where one is known.
        traceback: The traceback of a failed import.
        milliseconds: Time its import and registration took.
        hooks: Names of the hooks it implements.
        requirements: Requirement strings of its ``target`` extra.
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
    requirements: tuple[str, ...] = field(default=())

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
    its dist-info) is one plugin.
    """
    found: dict[tuple[str, str], PluginRecord] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        dist = entry.dist
        record = PluginRecord(
            name=entry.name,
            distribution=(dist.name if dist is not None else None) or entry.value,
            version=(dist.version if dist is not None else None) or "",
            entry=entry.value,
            requirements=_target_requirements(dist.requires if dist is not None else None),
        )
        found.setdefault((canonicalize_name(record.distribution), record.name), record)
    return sorted(found.values(), key=lambda r: (r.name, r.distribution))


def mark_duplicates(records: Iterable[PluginRecord]) -> list[PluginRecord]:
    """Return the records sorted by name; of those to be loaded, one per name stays so."""
    marked: list[PluginRecord] = []
    first: dict[str, PluginRecord] = {}
    for record in sorted(records, key=lambda r: (r.name, r.distribution)):
        if record.status is not Status.FOUND:
            marked.append(record)
            continue
        taken = first.setdefault(record.name, record)
        if taken is record:
            marked.append(record)
            continue
        duplicate = replace(
            record,
            status=Status.DUPLICATE,
            reason=f"{taken.label} has the name {record.name!r} too and was taken",
            remedy=f"pip uninstall {record.distribution}, or block {taken.distribution}",
        )
        marked.append(duplicate)
    return marked


def _target_requirements(requires: Iterable[str] | None) -> tuple[str, ...]:
    found = []
    for text in requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or "extra" not in str(marker):
            continue
        if marker.evaluate({"extra": "target"}) and not marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(str(requirement))
    return tuple(found)


def check_requirements(record: PluginRecord) -> PluginRecord:
    """Return ``record`` with a status if the core or the target framework does not fit."""
    try:
        requires = importlib.metadata.requires(record.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return record
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(requirement.name) == CORE and not _satisfied(requirement):
            return replace(
                record,
                status=Status.CORE_INCOMPATIBLE,
                reason=f"needs {requirement}, but {CORE} {_version(CORE)} is installed",
                remedy=f"pip install -U {CORE} {record.distribution}",
            )
    for text in record.requirements:
        requirement = Requirement(text)
        installed = _version(requirement.name)
        if installed is None:
            return replace(
                record,
                status=Status.TARGET_MISSING,
                reason=f"needs {requirement}, which is not installed",
                remedy=f"pip install '{record.distribution}[target]'",
            )
        if not _satisfied(requirement):
            return replace(
                record,
                status=Status.TARGET_INCOMPATIBLE,
                reason=f"needs {requirement}, but {installed} is installed",
                remedy=f"pip install '{record.distribution}[target]'",
            )
    return record


def check_probes(record: PluginRecord, modules: Iterable[str]) -> PluginRecord:
    """Return ``record`` with status ``target-missing`` if one of ``modules`` cannot be imported.

    For frameworks that PyPI does not have under their own name (APEX), a plugin's hooks module
    names the import to look for: ``target_modules = ("apex.fused_dense",)``.
    """
    for module in modules:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            return replace(
                record,
                status=Status.TARGET_MISSING,
                reason=f"the module {module} cannot be imported",
                remedy=f"install the framework that provides {module}",
            )
    return record


def _version(name: str) -> str | None:
    if canonicalize_name(name) == CORE:
        return __version__  # what runs, whatever metadata an editable install left behind
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfied(requirement: Requirement) -> bool:
    installed = _version(requirement.name)
    if installed is None:
        return False
    try:
        return requirement.specifier.contains(Version(installed), prereleases=True)
    except InvalidVersion:
        return True
