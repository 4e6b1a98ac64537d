"""Puts the plugin's name on what its hook functions do wrong.

pluggy hands an exception of an implementation to the caller bare, without the plugin's name
(pluggy 1.7). The wrapper is put around each function once, when the plugin is registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, NoReturn

from bittern.errors import BitternError, PluginError
from bittern.hooks.results import WrongResultError, checked

__all__ = ["attribute", "plugin_failure"]


def plugin_failure(label: str, hook: str, name: str, error: Exception) -> BitternError:
    """Return what an exception of plugin ``label`` in ``hook`` becomes.

    An error that is meant for the user stays what it is, and gets the plugin's name.
    """
    if isinstance(error, BitternError):
        error.plugin = error.plugin or label
        return error
    if isinstance(error, WrongResultError):
        return PluginError(f"plugin {label} {error.got}", hint=error.hint)
    return PluginError(
        f"plugin {label} failed in hook {hook}: {type(error).__name__}: {error}",
        hint=f"tell the plugin's authors; BITTERN_DISABLE_PLUGINS={name} goes on without it",
    )


def attribute(
    function: Callable[..., Any],
    *,
    label: str,
    name: str,
    hook: str,
    wrapper: bool = False,
    old: bool = False,
) -> Callable[..., Any]:
    """Return ``function`` with its results checked and its failures attributed.

    Args:
        function: The hook implementation, called with positional arguments by pluggy.
        label: ``"distribution version"`` of the plugin.
        name: The plugin's name.
        hook: Name of the hook.
        wrapper: Whether the function is a hook wrapper: a generator that yields once.
        old: Whether it is one of the old style, which returns nothing of its own.

    Returns:
        A function of the same kind: a generator function for wrappers.
    """

    def fail(error: Exception) -> NoReturn:
        found = plugin_failure(label, hook, name, error)
        if found is error:
            raise error
        raise found from error

    def wrapped(*args: Any) -> Generator[Any, Any, Any]:
        try:
            generator = function(*args)
            value = next(generator)
        except Exception as error:
            fail(error)
        inside: BaseException | None = None  # belongs to whoever runs within, not to us
        try:
            try:
                sent = yield value
            except BaseException as error:
                inside = error
                generator.throw(error)
            else:
                generator.send(sent)
            raise RuntimeError("the wrapper yielded twice")
        except StopIteration as stop:
            result = stop.value
        except Exception as error:
            if error is inside:
                raise
            fail(error)
        try:
            return result if old else checked(hook, result, wrapper=True)
        except Exception as error:
            fail(error)

    def call(*args: Any) -> Any:
        try:
            result = function(*args)
            if inspect.isgenerator(result):
                result = list(result)
            return checked(hook, result)
        except Exception as error:
            fail(error)

    return wrapped if wrapper else call
