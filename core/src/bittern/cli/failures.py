"""How an exception ends a command: one message, one exit code, and the JSON object if asked for."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from typing import Any

import click

from bittern.cli.context import App
from bittern.errors import BitternError, OutputError, PluginError

__all__ = ["BUG", "ERROR", "INTERRUPTED", "OutOfMemoryError", "guarded"]

ERROR, BUG, INTERRUPTED = 2, 1, 130


class OutOfMemoryError(BitternError):
    """The machine or the GPU has too little memory."""


def guarded(call: Callable[[], Any], app: App, *, wants_json: bool) -> int:
    """Run a command line and return its exit code.

    Args:
        call: Runs it; what it returns, if an integer, is the exit code.
        app: The run.
        wants_json: Whether ``--json`` was given, which click may not have come to parse.
    """
    try:
        code = call()
    except Exception as error:
        return _end(error, app, wants_json=wants_json)
    except KeyboardInterrupt as error:
        return _end(error, app, wants_json=wants_json)
    return code if isinstance(code, int) else 0


def _end(error: BaseException, app: App, *, wants_json: bool) -> int:
    if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__  # click takes any EOFError for Ctrl-D; a truncated file is none

    def answer(data: dict[str, str | None]) -> None:
        if (wants_json or app.json) and not app.answered:
            app.emit(data)

    if isinstance(error, click.Abort | KeyboardInterrupt):
        what = _interrupted(app)
        answer({"error": "Interrupted", "what": what, "where": None, "hint": None})
        click.echo(what, err=True)
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        what = error.format_message()
        answer({"error": type(error).__name__, "what": what, "where": None, "hint": None})
        error.show()
        return error.exit_code
    known = explain(error)
    if known is not None:
        answer(known.to_dict())
        click.secho(f"error: {known}", fg="red", err=True)
        if os.environ.get("BITTERN_DEBUG", "") not in ("", "0"):
            click.echo(_traceback(error), err=True)
        return ERROR
    what = f"{type(error).__name__}: {error}"
    hint = "this is a bug in bittern or in a plugin; please report it with the traceback"
    answer({"error": type(error).__name__, "what": what, "where": None, "hint": hint})
    click.secho(f"error: {hint}", fg="red", err=True)
    click.echo(_traceback(error), err=True)
    return BUG


def explain(error: BaseException) -> BitternError | None:
    """Return what to tell the user; ``None`` for an exception that nobody raised on purpose."""
    if isinstance(error, BitternError):
        if isinstance(error, PluginError) and error.__cause__ is not None:
            return _resource(error.__cause__) or error
        return error
    return _resource(error)


def _resource(error: BaseException) -> BitternError | None:
    """Return the error for what the machine, and no code, is to blame for."""
    text = str(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, for GPUs
        or (isinstance(error, RuntimeError) and "can't allocate memory" in text)
    ):
        return OutOfMemoryError(
            "out of memory",
            hint="use a smaller --batch-size or --seq-len, another --device, or a smaller model",
        )
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "os error 28" in text:
        where = getattr(error, "filename", None)
        return OutputError(
            "the disk is full", where=str(where) if where else None, hint="free some space"
        )
    return None


def _interrupted(app: App) -> str:
    if app.written is not None:
        return f"interrupted; {app.written} is written, but not verified"
    return "interrupted; nothing was written"


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
