"""``bittern plan``: who would be quantized how; nothing is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bittern.cli.context import App, json_option, pass_app
from bittern.cli.options import model_argument, recipe_options

if TYPE_CHECKING:
    from bittern.records import Plan

__all__ = ["plan"]

EPILOG = """\b
Examples:
  bittern plan MODEL --recipe int8
  bittern plan MODEL --recipe int8 -o rules.0.weight.granularity=tensor --json"""


@click.command(epilog=EPILOG)
@model_argument
@recipe_options
@json_option
@pass_app
def plan(app: App, *, model: str, recipe: str, overrides: tuple[str, ...]) -> None:
    """Show what a recipe would do to a model.

    MODEL is a directory or a hub name. Shows who is quantized how and by whose rule, what is
    skipped and why, and the bytes before and after.
    """
    toolkit = app.toolkit
    whole = toolkit.recipe(recipe, overrides)
    app.say(f"loading {model}")
    found = toolkit.plan(toolkit.load(model), whole)
    if app.json:
        app.emit(_as_dict(found))
        return
    from bittern.report.console import show_plan

    show_plan(found, app.console)
    steps = ", ".join(name for name, _ in found.algorithm) or "none"
    needed = "needs calibration data" if found.needs_data else "needs no data"
    app.console.print(f"calibration: {steps}; {needed}")


def _as_dict(found: Plan) -> dict[str, Any]:
    from bittern.report import Report

    later = ("calibration", "evaluation", "export", "verification")
    data = {k: v for k, v in Report(plan=found).to_dict().items() if k not in later}
    algorithm = [{"name": name, "options": dict(options)} for name, options in found.algorithm]
    return {**data, "algorithm": algorithm, "needs_data": found.needs_data}
