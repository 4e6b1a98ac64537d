"""Records the calls of hooks: who was asked what, and what the answer was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from bittern.hooks.manager import PluginManager
from bittern.toolkit import Toolkit

__all__ = ["HookCall", "HookRecorder"]


@dataclass(frozen=True)
class HookCall:
    """One call of one plugin's hook implementation.

    Attributes:
        hook: Name of the hook.
        plugin: ``"distribution version"``, or ``"bittern"`` for core.
        arguments: What the implementation took, by name.
        result: What it returned.
        error: What it raised.
    """

    hook: str
    plugin: str
    arguments: Mapping[str, Any]
    result: Any = None
    error: BaseException | None = None

    def __str__(self) -> str:
        given = ", ".join(f"{k}=<{type(v).__name__}>" for k, v in self.arguments.items())
        return f"{self.hook}({given}) of {self.plugin}"


class HookRecorder:
    """Records every call while its block runs, in the order in which the calls ended.

    ``with HookRecorder(toolkit) as calls: ...; calls.assert_called("after_convert", model=model)``.

    Args:
        source: The Toolkit or manager whose hooks are watched.
    """

    def __init__(self, source: Toolkit | PluginManager) -> None:
        self._manager = source.plugins if isinstance(source, Toolkit) else source
        self._calls: list[HookCall] = []
        self._undo: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self._undo = self._manager.intercept(self._watch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    # --- questions ---

    def calls(self, hook: str | None = None) -> list[HookCall]:
        """Return the recorded calls of ``hook``, or all of them."""
        return [call for call in self._calls if hook in (None, call.hook)]

    def assert_called(
        self, hook: str, *, plugin: str | None = None, **arguments: object
    ) -> HookCall:
        """Assert that ``hook`` was called, by whom and with what, and return the first such call.

        Args:
            hook: Name of the hook.
            plugin: Label or distribution of the plugin that had to answer.
            arguments: Arguments that had to be given, compared by identity, then equality.
        """
        __tracebackhide__ = True
        for call in self.calls(hook):
            if _fits(call, plugin, arguments):
                return call
        seen = "\n".join(f"  {call}" for call in self._calls) or "  nothing"
        raise AssertionError(f"{hook} was not called so; these calls were seen:\n{seen}")

    def assert_not_called(self, hook: str, *, plugin: str | None = None) -> None:
        """Assert that nobody was asked ``hook``, or that ``plugin`` was not."""
        __tracebackhide__ = True
        found = [call for call in self.calls(hook) if _fits(call, plugin, {})]
        if found:
            raise AssertionError(f"{hook} was called: {found[0]}")

    def pop(self, hook: str) -> HookCall:
        """Remove the first recorded call of ``hook`` and return it."""
        __tracebackhide__ = True
        call = self.assert_called(hook)
        self._calls.remove(call)
        return call

    def clear(self) -> None:
        """Forget what was recorded."""
        self._calls.clear()

    # --- recording ---

    def _watch(
        self,
        function: Callable[..., Any],
        *,
        hook: str,
        plugin: str,
        names: tuple[str, ...],
        wrapper: bool,
    ) -> Callable[..., Any]:
        def keep(args: tuple[Any, ...], result: Any, error: BaseException | None) -> None:
            given = dict(zip(names, args, strict=False))
            self._calls.append(HookCall(hook, plugin, given, result, error))

        def around(*args: Any) -> Generator[Any, Any, Any]:
            try:
                result = yield from function(*args)
            except BaseException as error:
                keep(args, None, error)
                raise
            keep(args, result, None)
            return result

        def plain(*args: Any) -> Any:
            try:
                result = function(*args)
                if inspect.isgenerator(result):
                    result = list(result)
            except BaseException as error:
                keep(args, None, error)
                raise
            keep(args, result, None)
            return result

        return around if wrapper else plain


def _fits(call: HookCall, plugin: str | None, arguments: Mapping[str, object]) -> bool:
    if plugin is not None and plugin not in (call.plugin, call.plugin.partition(" ")[0]):
        return False
    for name, value in arguments.items():
        if name not in call.arguments:
            return False
        given = call.arguments[name]
        if given is not value and (type(given) is not type(value) or given != value):
            return False
    return True
