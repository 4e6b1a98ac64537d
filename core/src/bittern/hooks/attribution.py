"""Wraps a plugin's hook functions: a failure names the plugin, and a trace shows every call.

pluggy hands an exception of an implementation to the caller bare, without the plugin's name
(pluggy 1.7). The wrapper is put around each function once, when the plugin is registered.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator
from typing import Any

from bittern.errors import BitternError, PluginError

__all__ = ["TraceSink", "attribute", "plugin_failure"]

TraceSink = Callable[[str], object]


def plugin_failure(label: str, hook: str, name: str, error: BaseException) -> PluginError:
    """Return the `PluginError` for an exception of plugin ``label`` in ``hook``."""
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
    trace: TraceSink | None,
    wrapper: bool = False,
) -> Callable[..., Any]:
    """Return ``function`` with failures attributed and calls traced.

    Args:
        function: The hook implementation, called with positional arguments by pluggy.
        label: ``"distribution version"`` of the plugin.
        name: The plugin's name.
        hook: Name of the hook.
        trace: Where trace lines go; ``None`` traces nothing.
        wrapper: Whether the function is a hook wrapper: a generator that yields once.

    Returns:
        A function of the same kind: a generator function for wrappers.
    """

    def failure(error: Exception) -> PluginError:
        return plugin_failure(label, hook, name, error)

    def wrapped(*args: Any) -> Generator[Any, Any, Any]:
        if trace is not None:
            trace(f"{hook}({_short(args)}) <- {name}: wraps\n")
        try:
            generator = function(*args)
            value = next(generator)
        except BitternError:
            raise
        except Exception as error:
            raise failure(error) from error
        try:
            sent = yield value
        except BaseException as downstream:  # belongs to whoever runs inside, not to us
            try:
                generator.throw(downstream)
            except StopIteration as stop:
                return stop.value
            except BitternError:
                raise
            except Exception as error:
                if error is downstream:
                    raise
                raise failure(error) from error
        else:
            try:
                generator.send(sent)
            except StopIteration as stop:
                return stop.value
            except BitternError:
                raise
            except Exception as error:
                raise failure(error) from error
        raise failure(RuntimeError("the wrapper yielded twice"))

    if wrapper:
        return wrapped

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            result = function(*args)
            if inspect.isgenerator(result):
                result = list(result)
        except Exception as error:
            if trace is not None:
                trace(f"{hook}({_short(args)}) <- {name}: raised {type(error).__name__}\n")
            if isinstance(error, BitternError):
                raise
            raise failure(error) from error
        if trace is not None:
            milliseconds = (time.perf_counter() - start) * 1e3
            trace(f"{hook}({_short(args)}) <- {name}: {_short(result)} [{milliseconds:.2f} ms]\n")
        return result

    return call


def _short(value: object, limit: int = 120) -> str:
    text = repr(value) if not isinstance(value, tuple) else ", ".join(_one(v) for v in value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one(value: object) -> str:
    """Name big objects by their type: the repr of a model fills a screen."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"
