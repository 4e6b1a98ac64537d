"""Shows every hook call on a line: arguments, whose implementation, result, milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

__all__ = ["TraceSink", "traced"]

TraceSink = Callable[[str], object]


def traced(
    function: Callable[..., Any],
    *,
    name: str,
    hook: str,
    arguments: Sequence[str],
    sink: TraceSink,
    wrapper: bool = False,
) -> Callable[..., Any]:
    """Return ``function`` with every call shown.

    Args:
        function: The hook implementation, called with positional arguments by pluggy.
        name: The plugin's name.
        hook: Name of the hook.
        arguments: Names of the positional arguments.
        sink: Where the lines go.
        wrapper: Whether the function is a hook wrapper, which is shown when it starts and ends.

    Returns:
        A function of the same kind: a generator function for wrappers.
    """

    def show(args: tuple[Any, ...], what: str, start: float | None = None) -> None:
        given = ", ".join(f"{n}={_one(a)}" for n, a in zip(arguments, args, strict=False))
        took = "" if start is None else f" [{(time.perf_counter() - start) * 1e3:.2f} ms]"
        sink(f"{hook}({given}) <- {name}: {what}{took}\n")

    def wrapped(*args: Any) -> Generator[Any, Any, Any]:
        start = time.perf_counter()
        show(args, "wraps")
        try:
            result = yield from function(*args)
        except BaseException as error:
            show(args, f"wrapped, raised {type(error).__name__}", start)
            raise
        show(args, f"wrapped, {_short(result)}", start)
        return result

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            result = function(*args)
        except BaseException as error:
            show(args, f"raised {type(error).__name__}", start)
            raise
        show(args, _short(result), start)
        return result

    return wrapped if wrapper else call


def _short(value: object, limit: int = 120) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one(value: object) -> str:
    """Name big objects by their type: the repr of a model fills a screen."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"
