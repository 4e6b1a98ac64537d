"""``bittern recipes``: which there are, what one says, and the schema for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bittern.cli.context import App, json_option, pass_app

__all__ = ["recipes"]

EPILOG = """\b
Examples:
  bittern recipes
  bittern recipes show int8 --resolved > mine.yaml
  bittern recipes schema > recipe.schema.json"""


@click.group(epilog=EPILOG, invoke_without_command=True)
@json_option
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List and show recipes.

    Without a sub-command: the names that --recipe takes.
    """
    if ctx.invoked_subcommand is not None:
        return
    app = ctx.ensure_object(App)
    table = app.toolkit.registry.recipes
    rows = [
        {"name": name, "description": table.get(name).description, "plugin": table.plugin(name)}
        for name in table
    ]
    if app.json:
        app.emit({"recipes": rows})
        return
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title="recipes")
    for column in ("name", "what it does", "from"):
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(row[key]) for key in ("name", "description", "plugin")))
    app.console.print(shown)


@recipes.command(epilog="\b\nExample:\n  bittern recipes show int8 --resolved")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="With everything it extends.")
@json_option
@pass_app
def show(app: App, *, name: str, resolved: bool) -> None:
    """Show what a recipe says, as YAML.

    NAME is a recipe's name or a YAML file.
    """
    data = _resolved(app, name) if resolved else _source(app, name)
    if app.json:
        app.emit(data)
        return
    import yaml

    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)


@recipes.command(epilog="\b\nExample:\n  bittern recipes schema > recipe.schema.json")
@json_option
@pass_app
def schema(app: App) -> None:
    """Print the JSON schema of recipes, for editors."""
    from bittern.config import recipe_schema

    app.emit(recipe_schema())


def _resolved(app: App, name: str) -> dict[str, Any]:
    """Return a recipe that stands alone: only what was said, so that it can be edited."""
    whole = app.toolkit.recipe(name)
    data: dict[str, Any] = whole.model_dump(by_alias=True, exclude_unset=True)
    return {key: value for key, value in data.items() if value != []}


def _source(app: App, name: str) -> dict[str, Any]:
    from bittern.config import parse_yaml, read_recipe_text, read_source

    if not name.endswith((".yaml", ".yml")):
        return read_source(app.toolkit.registry.recipes.get(name))
    app.toolkit.recipe(name)  # a malformed file is an error here too
    found: dict[str, Any] = parse_yaml(read_recipe_text(Path(name))) or {}
    return found
