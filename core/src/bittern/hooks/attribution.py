"""Puts the plugin's name on what its hook functions do wrong.

pluggy hands an exception of an implementation to the caller bare, without the plugin's name
(pluggy 1.7). The wrapper is put around each function once, when the plugin is registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

from bittern.errors import BitternError, PluginError
from bittern.hooks.results import WrongResultError, checked

__all__ = ["Foreign", "attribute", "named"]


class Foreign:
    """Failures of functions that were handed to a plugin: they are not the plugin's."""

    def __init__(self) -> None:
        self._seen: dict[int, str | None] = {}

    def watch(self, value: Any) -> Any:
        """Return ``value``; a function comes with its failures noted."""
        return partial(self._call, value) if inspect.isroutine(value) else value

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as error:
            self._seen[id(error)] = getattr(error, "plugin", None)
            raise

    def original(self, error: BaseException) -> BaseException | None:
        """Return the noted failure that ``error`` is or was made of; ``None`` for the plugin's."""
        for found in (error, error.__cause__):
            if found is not None and id(found) in self._seen:
                if isinstance(found, BitternError):
                    found.plugin = self._seen[id(found)]
                return found
        return None


def named(error: Exception, *, label: str, what: str, name: str) -> BitternError:
    """Return what an exception of a plugin becomes.

    An error that is meant for the user stays what it is, and gets the plugin's name.

    Args:
        error: The exception.
        label: ``"distribution version"`` of the plugin.
        what: Where it failed: ``"in hook register_modules"``.
        name: The plugin's name, by which it can be blocked.
    """
    found: BitternError
    if isinstance(error, BitternError):
        found = error
    elif isinstance(error, WrongResultError):
        found = PluginError(f"plugin {label} {error.got}", hint=error.hint)
    else:
        found = PluginError(
            f"plugin {label} failed {what}: {type(error).__name__}: {error}",
            hint=f"tell the plugin's authors; BITTERN_DISABLE_PLUGINS={name} goes on without it",
        )
    found.plugin = found.plugin or label  # the innermost one, where a hook calls other plugins
    return found


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
        found = named(error, label=label, what=f"in hook {hook}", name=name)
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
            found = checked(hook, result)
        except Exception as error:
            fail(error)
        if found is not None and hook == "resolve_weight_access":
            return _Access(found, fail)
        return found

    return wrapped if wrapper else call


class _Access(AbstractContextManager[Any]):
    """A plugin's context manager; what fails in entering or leaving it is the plugin's."""

    def __init__(
        self, inner: AbstractContextManager[Any], fail: Callable[[Exception], NoReturn]
    ) -> None:
        self._inner = inner
        self._fail = fail

    def __enter__(self) -> Any:
        try:
            return self._inner.__enter__()
        except Exception as error:
            self._fail(error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, traceback)
        except Exception as own:
            if own is error:
                raise
            self._fail(own)
