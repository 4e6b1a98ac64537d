"""String targets: ``"defining.module:Qualified.Name"``.

They let a rule speak about a class of a framework that is not imported, and may not be installed.
"""

from __future__ import annotations

import importlib
from typing import Any

from bittern.errors import PluginError

__all__ = ["resolve", "target_of"]


def target_of(cls: type) -> str:
    """Return the target string of a class: the module that defines it and its qualified name."""
    return f"{cls.__module__}:{cls.__qualname__}"


def resolve(target: str, *, plugin: str = "bittern") -> Any:
    """Import what a target string names.

    Args:
        target: ``"package.module:name"``.
        plugin: Who registered it, for the error.

    Raises:
        PluginError: The string is malformed, or names nothing.
    """
    module_name, colon, qualname = target.partition(":")
    if not colon or not module_name or not qualname:
        raise PluginError(
            f"plugin {plugin}: {target!r} is not a target",
            hint='write "package.module:Name"',
        )
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"plugin {plugin}: the target {target!r} does not resolve: {error}",
            hint="name the module that defines it (cls.__module__), not one that re-exports it",
        ) from error
    return found
