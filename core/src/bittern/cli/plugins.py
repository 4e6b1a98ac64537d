"""``bittern plugins``: what is installed, what became of it, which hooks there are, a new one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bittern.cli.context import App, json_option, pass_app, warn
from bittern.cli.hookdocs import hook_docs
from bittern.errors import PluginError

if TYPE_CHECKING:
    from bittern.hooks.discovery import PluginRecord
    from bittern.toolkit import Toolkit

__all__ = ["COLORS", "plugins", "record_dict"]

COLORS = {
    "loaded": "green",
    "blocked": "dim",
    "target-missing": "dim",
    "partial": "yellow",
}  # every other status is red

EPILOG = """\b
Examples:
  bittern plugins list
  bittern plugins list --hook register_exporters
  bittern plugins show huggingface
  bittern plugins hooks
  bittern plugins new heron"""


@click.group(epilog=EPILOG)
def plugins() -> None:
    """List plugins and hooks, begin a new plugin."""


@plugins.command("list", epilog="\b\nExample:\n  bittern plugins list --all --json")
@click.option("--all", "everything", is_flag=True, help="Core's own hooks too.")
@click.option("--hook", help="Only plugins that implement this hook.")
@click.option("--requirements", is_flag=True, help="As lines for a requirements file.")
@json_option
@pass_app
def list_(app: App, *, everything: bool, hook: str | None, requirements: bool) -> None:
    """List installed plugins and what became of each."""
    toolkit = _toolkit(app)
    records = list(toolkit.plugins.records)
    if everything:
        records.insert(0, _builtin(toolkit))
    if hook is not None:
        _check_hook(hook)
        records = [r for r in records if hook in r.hooks]
    if requirements:
        lines = [f"{r.distribution}=={r.version}" for r in records if r.version]
        if app.json:
            app.emit({"requirements": lines})
        elif lines:
            click.echo("\n".join(lines))
        return
    if app.json:
        app.emit({"plugins": [record_dict(r) for r in records]})
        return
    if not records:
        none = "no plugin is installed" if hook is None else f"no plugin implements {hook}"
        app.console.print(f"{none}; `bittern plugins hooks` shows what one can do")
        return
    _show_table(app, records)


@plugins.command(epilog="\b\nExample:\n  bittern plugins show huggingface")
@click.argument("name")
@json_option
@pass_app
def show(app: App, *, name: str) -> None:
    """Show all that is known about a plugin.

    NAME is its short name or its distribution.
    """
    toolkit = _toolkit(app)
    records = [_builtin(toolkit), *toolkit.plugins.records]
    found = [r for r in records if r.answers_to([name])]
    if not found:
        from bittern.registry.tables import nearest

        raise PluginError(
            f"the plugin {name!r} is not installed",
            hint=f"did you mean {nearest(name, [r.name for r in records])[0]!r}? "
            "`bittern plugins list` shows what is installed",
        )
    if app.json:
        app.emit(
            record_dict(found[0])
            if len(found) == 1
            else {"plugins": [record_dict(r) for r in found]}
        )
        return
    for record in found:
        _show_record(app, record)


@plugins.command(epilog="\b\nExample:\n  bittern plugins hooks --json")
@json_option
@pass_app
def hooks(app: App) -> None:
    """List the hooks a plugin can implement."""
    toolkit = _toolkit(app)
    docs = hook_docs()
    users = {doc.name: list(toolkit.plugins.implementations(doc.name)) for doc in docs}
    if app.json:
        rows = [
            {
                "name": d.name,
                "kind": d.kind,
                "arguments": d.arguments,
                "returns": d.returns,
                "summary": d.summary,
                "reserved": d.reserved,
                "plugins": users[d.name],
            }
            for d in docs
        ]
        app.emit({"hooks": rows})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="hooks")
    for column in ("hook", "results", "what for", "implemented by"):
        table.add_column(column, overflow="fold")
    for doc in docs:
        summary = escape(doc.summary) + (" [dim](reserved)[/]" if doc.reserved else "")
        table.add_row(doc.signature, doc.kind, summary, escape("\n".join(users[doc.name])))
    app.console.print(table)


@plugins.command(epilog="\b\nExample:\n  bittern plugins new heron --target 'heron-nn>=2'")
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to; bittern-NAME by default.",
)
@click.option(
    "--target",
    metavar="REQUIREMENT",
    help="The framework it is for; by default one is made up and written too.",
)
@json_option
@pass_app
def new(app: App, *, name: str, output: Path | None, target: str | None) -> None:
    """Write a complete plugin to start from.

    NAME is its short name: `heron` becomes the distribution bittern-heron. As it is written, it
    quantizes, traces and exports the models of a small made-up framework, and its tests pass.
    """
    from bittern.cli.scaffold import scaffold, write

    plugin = scaffold(name, target)
    app.say("writing ...")
    folder = output if output is not None else Path(plugin.distribution)
    names = write(plugin, folder)
    if app.json:
        app.emit(
            {
                "path": str(folder),
                "name": plugin.name,
                "distribution": plugin.distribution,
                "package": plugin.package,
                "files": names,
            }
        )
        return
    click.echo(f"{folder}: {len(names)} files of {plugin.distribution}. To try it:")
    click.echo(f"  cd {folder}\n  {plugin.values()['install']}\n  pytest")


def record_dict(record: PluginRecord) -> dict[str, Any]:
    """Return a plugin's record as plain data."""
    from dataclasses import asdict

    return {**asdict(record), "status": str(record.status)}


def _toolkit(app: App) -> Toolkit:
    toolkit, error = app.lenient_toolkit()
    if error is not None:
        warn(str(error))
    return toolkit


def _builtin(toolkit: Toolkit) -> PluginRecord:
    """Return a record of core's own hooks: they go through the same door."""
    from bittern._version import __version__
    from bittern.hooks.discovery import PluginRecord, Status
    from bittern.hooks.manager import BUILTIN

    names = [d.name for d in hook_docs() if BUILTIN in toolkit.plugins.implementations(d.name)]
    return PluginRecord(
        name=BUILTIN,
        distribution=BUILTIN,
        version=__version__,
        entry="bittern.builtin.hooks",
        status=Status.LOADED,
        hooks=tuple(sorted(names)),
    )


def _check_hook(hook: str) -> None:
    names = [doc.name for doc in hook_docs()]
    if hook not in names:
        from bittern.registry.tables import nearest

        raise PluginError(
            f"there is no hook {hook!r}",
            hint=f"did you mean {nearest(hook, names)[0]!r}? `bittern plugins hooks` lists them",
        )


def _show_table(app: App, records: list[PluginRecord]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="plugins")
    for column in ("name", "distribution", "version", "status", "hooks", "ms", "why"):
        right = column in ("hooks", "ms")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for record in records:
        color = COLORS.get(record.status, "red")
        why = escape(record.reason)
        if record.remedy:
            why += f"\n[dim]{escape(record.remedy)}[/]"
        table.add_row(
            escape(record.name),
            escape(record.distribution),
            record.version,
            f"[{color}]{record.status}[/]",
            str(len(record.hooks)),
            f"{record.milliseconds:.1f}",
            why,
        )
    app.console.print(table)


def _show_record(app: App, record: PluginRecord) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(record.label), show_header=False)
    rows = {
        "name": record.name,
        "status": str(record.status),
        "why": record.reason,
        "remedy": record.remedy,
        "module": record.entry,
        "target": ", ".join(record.requirements),
        "hooks": "\n".join(record.hooks),
        "milliseconds": f"{record.milliseconds:.1f}",
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, escape(value))
    app.console.print(table)
    if record.traceback:
        click.echo(record.traceback)
