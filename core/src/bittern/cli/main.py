"""The root group: lazy commands, plugins' commands, global options, and how errors end.

``bittern --help`` imports click and the plugin loader, nothing else: a command's module is imported
when the command is called, so its summary stands here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from bittern._version import __version__
from bittern.cli.context import App, warn
from bittern.cli.failures import guarded
from bittern.cli.quiet import plugin_warnings, quiet_libraries
from bittern.errors import BitternError, PluginConflictError, PluginError

__all__ = ["COMMANDS", "Root", "main", "make_cli"]

# Name to where it is and what ``bittern --help`` says about it.
COMMANDS: dict[str, tuple[str, str]] = {
    "quantize": ("bittern.cli.quantize:quantize", "Quantize a model, export it, verify it."),
    "plan": ("bittern.cli.plan:plan", "Show what a recipe would do to a model."),
    "search": ("bittern.cli.search:search", "Find which part of a model gets which recipe."),
    "trace": ("bittern.cli.trace:trace", "Find which tensors of a model belong together."),
    "eval": ("bittern.cli.evaluate:evaluate", "Measure how good a model is."),
    "verify": ("bittern.cli.verify:verify", "Load a checkpoint in its client and compare."),
    "inspect": ("bittern.cli.inspect:inspect", "Say what a directory holds."),
    "recipes": ("bittern.cli.recipes:recipes", "List and show recipes."),
    "plugins": ("bittern.cli.plugins:plugins", "List plugins and hooks, begin a new plugin."),
    "doctor": ("bittern.cli.doctor:doctor", "Check the installation, say how to mend it."),
}

EPILOG = """\b
Example:
  bittern quantize MODEL --recipe int8 --data text.txt --output out/

\b
Exit codes: 0 done and verified, 2 an error of the input, 1 a bug or an ailing
installation, 130 interrupted. BITTERN_DEBUG=1 shows the traceback of every error."""


class Root(click.Group):
    """The group ``bittern``: commands of core by name, commands of plugins on demand."""

    _collected = False

    # --- running ---

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code."""
        given = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(given, prog_name, complete_var, False, **extra)
        app = extra.setdefault("obj", App())
        with plugin_warnings():
            code = guarded(
                lambda: super(Root, self).main(given, prog_name, complete_var, False, **extra),
                app,
                wants_json="--json" in given,
            )
        sys.exit(code)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the global options; ``--plugin`` counts for ``--help`` too, wherever it stands."""
        options, _, _ = self.make_parser(ctx).parse_args(list(args))
        asked = options.get("plugins")
        ctx.ensure_object(App).plugins = {
            "plugins": None if asked is None else _names(asked),
            "block": _names(*(options.get("no_plugin") or ())),
            "files": tuple(options.get("plugin") or ()),
            "strict": bool(options.get("strict_plugins")),
            "trace": bool(options.get("trace_plugins")),
        }
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command; what its function returns is not an exit code."""
        super().invoke(ctx)

    # --- commands ---

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a plugin's command.

        Raises:
            PluginConflictError: The name is taken.
        """
        key = name or cmd.name
        if key in COMMANDS or key in self.commands:
            raise PluginConflictError(f"the command {key!r} exists already", hint="rename it")
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return core's commands, then those of plugins."""
        try:
            self.collect(ctx)
        except PluginError as error:
            warn(str(error))
        return [*COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; plugins are asked only for names that core does not have."""
        if cmd_name in COMMANDS:
            module, _, attribute = COMMANDS[cmd_name][0].partition(":")
            command: click.Command = getattr(import_module(module), attribute)
            return command
        self.collect(ctx)
        return self.commands.get(cmd_name)

    def collect(self, ctx: click.Context) -> None:
        """Let plugins add their commands, once; one that fails costs only its own.

        Raises:
            PluginError: A plugin that was asked for by name cannot be loaded.
        """
        if self._collected:
            return
        plugins = ctx.ensure_object(App).toolkit.plugins
        self._collected = True
        for label, error in plugins.notify_each("register_commands", cli=self):
            what = error.what if isinstance(error, BitternError) else str(error)
            warn(what if label in what else f"plugin {label}: {what}")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one names the nearest."""
        name = args[0]
        known = name.startswith("-") or ctx.resilient_parsing
        if not known and self.get_command(ctx, name) is None:
            from bittern.registry.tables import nearest

            (near,) = nearest(name, self.list_commands(ctx))
            ctx.fail(f"No such command {name!r}. Did you mean {near!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands to the help text, without importing core's."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])
        names = self.list_commands(ctx)[len(COMMANDS) :]
        found = {n: self.commands[n] for n in names if not self.commands[n].hidden}
        room = formatter.width - 6 - max(map(len, found), default=0)
        rows = [(name, command.get_short_help_str(room)) for name, command in found.items()]
        if rows:
            with formatter.section("Commands of plugins"):
                formatter.write_dl(rows)


def _names(*texts: str) -> tuple[str, ...]:
    """Return the names in comma-separated lists."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def make_cli() -> Root:
    """Return a fresh ``bittern`` group, without any plugin's commands yet."""

    @click.group(
        "bittern",
        cls=Root,
        epilog=EPILOG,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    @click.option("--plugin", multiple=True, metavar="FILE", help="Load an unpackaged plugin too.")
    @click.option("--plugins", metavar="A,B", help="Use these installed plugins and no others.")
    @click.option("--no-plugin", multiple=True, metavar="NAME", help="Leave out a plugin; * all.")
    @click.option("--strict-plugins", is_flag=True, help="Every installed plugin must load.")
    @click.option("--trace-plugins", is_flag=True, help="Show every hook call on stderr.")
    @click.version_option(__version__, prog_name="bittern", message="%(prog)s %(version)s")
    def cli(**_: object) -> None:
        """Make neural networks smaller and faster: quantize, calibrate, prove, export."""
        # `Root.parse_args` has handed the options to the App: --help needs them before this runs.

    return cli


def main() -> None:
    """Run ``bittern``."""
    quiet_libraries()
    make_cli().main(prog_name="bittern")
