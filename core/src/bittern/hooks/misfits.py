"""Says in words what does not fit between a plugin's hook implementations and the specifications.

pluggy's own words name the object, several lines long, and not what would fit.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pluggy

from bittern.hooks import specs
from bittern.hooks.markers import PROJECT

__all__ = ["misfit", "no_such_hook"]


def no_such_hook(name: str) -> str:
    """Return the reason for an implementation of a hook that is not specified."""
    near = difflib.get_close_matches(name, _hooks(), n=1, cutoff=0.8)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"this version of bittern has no hook {name}{meant}"


def misfit(module: ModuleType | None, error: BaseException) -> str:
    """Return why pluggy refuses a hooks module; nothing for any other failure.

    Args:
        module: The hooks module, where it could be imported.
        error: What loading it raised.
    """
    if module is None or not isinstance(error, pluggy.PluginValidationError):
        return ""
    hooks = _hooks()
    for name, function in _implementations(module):
        if name not in hooks:
            continue
        for argument, parameter in inspect.signature(function).parameters.items():
            if argument not in hooks[name] and parameter.default is parameter.empty:
                known = ", ".join(hooks[name]) or "none"
                return f"the hook {name} has no argument {argument!r}, it has {known}"
    return " ".join(str(error).split())


def _hooks() -> dict[str, list[str]]:
    """Return the names of the arguments of every hook."""
    return {
        name: list(inspect.signature(spec).parameters)
        for name, spec in vars(specs).items()
        if getattr(spec, f"{PROJECT}_spec", None) is not None
    }


def _implementations(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, function in vars(module).items():
        options = getattr(function, f"{PROJECT}_impl", None)
        if isinstance(options, dict):
            yield options.get("specname") or name, function
