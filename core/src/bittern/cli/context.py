"""What every command gets: the lazily built Toolkit, the console, and one way to answer.

A plugin's command takes the same: ``@pass_app`` gives it the `App`, ``@json_option`` the switch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from bittern.errors import BitternError, PluginError

if TYPE_CHECKING:
    from rich.console import Console

    from bittern.runtime import Progress
    from bittern.toolkit import Toolkit

__all__ = ["App", "json_option", "pass_app", "warn"]

F = TypeVar("F", bound=Callable[..., Any])
WIDE = 200  # columns where stdout is no terminal: a table in a file or pipe must not be folded


class App:
    """One run of the command line; click's context object.

    Attributes:
        plugins: Which plugins the root options ask for.
        json: Whether the answer is one JSON object.
        answered: Whether that object was printed.
        written: The output directory, once it is there; for what Ctrl-C has to say.
    """

    def __init__(self) -> None:
        self.plugins: dict[str, Any] = {}
        self.json = False
        self.answered = False
        self.written: Path | None = None

    @cached_property
    def toolkit(self) -> Toolkit:
        """The Toolkit, built on first use.

        Raises:
            PluginError: A plugin that was asked for by name cannot be loaded.
        """
        from bittern.toolkit import Toolkit

        return Toolkit(**self.plugins)

    def lenient_toolkit(self) -> tuple[Toolkit, PluginError | None]:
        """Return a Toolkit even where a required plugin is broken, and what is wrong.

        For the commands that report on plugins, which are needed most when one does not load.
        """
        try:
            return self.toolkit, None
        except PluginError as error:
            from bittern.builtin import hooks as builtin
            from bittern.hooks.discovery import PluginOptions
            from bittern.hooks.manager import PluginManager
            from bittern.toolkit import Toolkit

            options = PluginOptions.from_environment().merged(**self.plugins)
            return Toolkit(manager=PluginManager(options, builtin=builtin, lenient=True)), error

    @cached_property
    def console(self) -> Console:
        """The console of stdout."""
        from rich.console import Console

        console = Console()
        if console.is_terminal or "COLUMNS" in os.environ:
            return console
        return Console(width=WIDE)

    @property
    def progress(self) -> Progress:
        """Progress on stdout; none with ``--json``."""
        if self.json:
            from bittern.runtime.progress import SILENT

            return SILENT
        from bittern.report.progress import ConsoleProgress

        return ConsoleProgress(self.console)

    def say(self, text: str) -> None:
        """Tell somebody at a terminal what takes a while now."""
        if not self.json and self.console.is_terminal:
            self.console.print(text, style="dim", markup=False, highlight=False)

    def emit(self, data: Mapping[str, Any]) -> None:
        """Print the one JSON object; NaN and infinities, which JSON lacks, become ``null``."""
        finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
        click.echo(json.dumps(finite, indent=1))
        self.answered = True

    def fail(self, error: BitternError, data: Mapping[str, Any]) -> NoReturn:
        """Raise ``error``; with ``--json`` the one object holds ``data`` and the error."""
        if self.json:
            self.emit({**data, **error.to_dict()})
        raise error


pass_app = click.make_pass_decorator(App)


def json_option(function: F) -> F:
    """Add ``--json``, which sets `App.json`."""
    return click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_json,
        help="Print one JSON object instead.",
    )(function)


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(App).json = True


def warn(text: str) -> None:
    """Print a warning on stderr, in one line."""
    click.secho(f"warning: {' '.join(text.split())}", fg="yellow", err=True)
