"""String targets: ``"defining.module:Qualified.Name"``.

They let a rule speak about a class of a framework that is not imported, and may not be installed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from bittern.errors import PluginError
from bittern.hooks.attribution import Foreign, named

__all__ = ["bound", "resolve", "target_of", "why_dead"]

CORE = "bittern"
MISSING = object()


def target_of(cls: type) -> str:
    """Return the target string of a class: the module that defines it and its qualified name."""
    return f"{cls.__module__}:{cls.__qualname__}"


def resolve(target: str, *, plugin: str = CORE) -> Any:
    """Import what a target string names.

    Args:
        target: ``"package.module:name"``.
        plugin: Who registered it, for the error.

    Raises:
        PluginError: The string is malformed, or names nothing that can be imported.
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
    except Exception as error:  # whatever the module, or the framework under it, raises
        raise PluginError(
            f"plugin {plugin}: {module_name} cannot be imported: {type(error).__name__}: {error}",
            hint="update the plugin or its framework; `bittern doctor` says what is installed",
        ) from error
    return found


def bound(target: str, *, plugin: str, returns: type | None = None) -> Callable[..., Any]:
    """Return the function that a plugin's record names; what it does wrong has the plugin's name.

    Core's own functions come as they are. What the machine is to blame for (files, memory) and
    what fails in a function that was handed to the plugin passes as it is.

    Args:
        target: ``"package.module:function"``.
        plugin: Label of the plugin whose record names it.
        returns: What it must return an instance of.

    Raises:
        PluginError: The target names nothing.
    """
    function = resolve(target, plugin=plugin)
    if plugin == CORE:
        return function  # type: ignore[no-any-return]

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        foreign = Foreign()
        try:
            result = function(*map(foreign.watch, args), **options)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            if foreign.original(error) is error:
                raise
            found = named(error, label=plugin, what=f"in {target}", name=plugin.partition(" ")[0])
            if found is error:
                raise
            raise found from error
        if returns is not None and not isinstance(result, returns):
            raise PluginError(
                f"plugin {plugin}: {target} returned a {type(result).__name__} instead of a "
                f"{returns.__name__}",
                hint=f"return a {target_of(returns)}",
            )
        return result

    return call


def why_dead(target: str) -> str:
    """Return why no class can ever match a target; nothing where that is not known.

    Only modules that are imported already are looked at, so that asking costs nothing.
    """
    module_name, _, qualname = target.partition(":")
    found: Any = sys.modules.get(module_name)
    if found is None:
        return ""
    for part in qualname.split("."):
        found = getattr(found, part, MISSING)
    if found is MISSING:
        return f"{module_name} has no {qualname}"
    if not isinstance(found, type):
        return f"{qualname} is no class"
    own = target_of(found)
    return "" if own == target else f"the class is defined as {own!r}"
