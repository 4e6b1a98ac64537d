"""``bittern trace``: which tensors of a model belong together."""

from __future__ import annotations

from pathlib import Path

import click

from bittern.cli.context import App, json_option, pass_app
from bittern.cli.options import load_options, model_argument

__all__ = ["trace"]

EPILOG = """\b
Examples:
  bittern trace MODEL
  bittern trace MODEL --tree
  bittern trace MODEL --explain model.layers.0.mlp.up_proj
  bittern trace MODEL --dot trace.dot --json"""


@click.command(epilog=EPILOG)
@model_argument
@click.option("--explain", metavar="NAME", help="Say in words what belongs to a module or tensor.")
@click.option("--tree", is_flag=True, help="Show what the dimensions of all weights are made of.")
@click.option(
    "--dot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the weights and what ties them as a graph in DOT; - prints it.",
)
@load_options
@json_option
@pass_app
def trace(
    app: App,
    *,
    model: str,
    explain: str | None,
    tree: bool,
    dot: Path | None,
    dtype: str,
    device: str,
) -> None:
    """Find which tensors of a model belong together.

    MODEL is a directory or a hub name. Shows shared inputs, scales that can be folded, dimensions
    that change together, and what could not be analysed and why.
    """
    from bittern.records import LoadConfig

    toolkit = app.toolkit
    app.say(f"loading {model}")
    found = toolkit.trace(toolkit.load(model, LoadConfig(dtype=dtype, device=device)))
    words = found.explain(explain) if explain is not None else None
    picture = found.to_dot() if dot is not None else None
    if picture is not None and str(dot) == "-" and not app.json:
        click.echo(picture, nl=False)
        return
    if picture is not None and dot is not None and str(dot) != "-":
        _write(dot, picture)
    if app.json:
        extra = {"explanation": words, "tree": found.to_tree() if tree else None}
        extra["dot"] = picture if str(dot) == "-" else None
        app.emit({**found.to_dict(), **{k: v for k, v in extra.items() if v is not None}})
        return
    if words is not None or tree:
        click.echo(words if words is not None else found.to_tree().rstrip())
        return
    from bittern.report.traces import show_trace

    show_trace(found, app.console)
    if dot is not None:
        app.console.print(f"wrote {dot}")


def _write(path: Path, text: str) -> None:
    from bittern.errors import OutputError

    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(
            f"it cannot be written: {error.strerror or error}", where=str(path)
        ) from error
