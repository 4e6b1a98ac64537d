"""Checks that core and the framework a plugin is for are there and fit, without importing them."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import replace

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from bittern._version import __version__
from bittern.hooks.discovery import CORE, PluginRecord, Status

__all__ = ["check_probes", "check_requirements"]


def check_requirements(
    record: PluginRecord, *, versions: dict[str, str | None] | None = None
) -> PluginRecord:
    """Return ``record`` with a status if the core or the target framework does not fit.

    Args:
        record: The plugin.
        versions: Installed versions that were looked up already; looking one up scans the path.
    """
    versions = versions if versions is not None else {}
    for text in record.core:
        requirement = Requirement(text)
        if not _satisfied(requirement, __version__):
            return replace(
                record,
                status=Status.CORE_INCOMPATIBLE,
                reason=f"needs {requirement}, but {CORE} {__version__} is installed",
                remedy=f"pip install -U {CORE} {record.distribution}",
            )
    for text in record.requirements:
        requirement = Requirement(text)
        if requirement.name not in versions:
            versions[requirement.name] = _version(requirement.name)
        installed = versions[requirement.name]
        if installed is None:
            return replace(
                record,
                status=Status.TARGET_MISSING,
                reason=f"needs {requirement}, which is not installed",
                remedy=f"pip install '{record.distribution}[target]'",
            )
        if not _satisfied(requirement, installed):
            return replace(
                record,
                status=Status.TARGET_INCOMPATIBLE,
                reason=f"needs {requirement}, but {installed} is installed",
                remedy=f"pip install '{record.distribution}[target]'",
            )
    return record


def check_probes(record: PluginRecord, modules: Iterable[str] | str) -> PluginRecord:
    """Return ``record`` with status ``target-missing`` if one of ``modules`` is not there.

    For frameworks that PyPI does not have under their own name (APEX), a plugin's hooks module
    names the import to look for: ``target_modules = ("apex.fused_dense",)``. Nothing is imported:
    that would cost seconds, and whatever the framework raises.
    """
    for module in (modules,) if isinstance(modules, str) else modules:
        if not _is_there(module):
            return replace(
                record,
                status=Status.TARGET_MISSING,
                reason=f"the module {module} cannot be imported",
                remedy=f"install the framework that provides {module}",
            )
    return record


def _is_there(module: str) -> bool:
    """Whether the import system finds a module, without importing the packages above it."""
    path: Iterable[str] | None = None
    parts = module.split(".")
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        if name in sys.modules:
            path = getattr(sys.modules[name], "__path__", ())
            continue
        if path is None:
            spec = importlib.util.find_spec(name)
        else:
            spec = importlib.machinery.PathFinder.find_spec(name, list(path))
        if spec is None:
            return False
        path = spec.submodule_search_locations or ()
    return True


def _version(name: str) -> str | None:
    if canonicalize_name(name) == CORE:
        return __version__  # what runs, whatever metadata an editable install left behind
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfied(requirement: Requirement, installed: str) -> bool:
    try:
        return requirement.specifier.contains(Version(installed), prereleases=True)
    except InvalidVersion:
        return True
