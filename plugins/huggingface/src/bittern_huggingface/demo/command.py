"""``bittern demo``: the whole way of a model through the house, on the model that ships with it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bittern.cli.context import App, json_option, pass_app

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DEMO", "demo"]

DEMO = Path(__file__).parent
RECIPES = ("int8", "fp8-dynamic", "int4")


@click.command(short_help="Quantize, export and reload the model that ships with bittern.")
@click.option("--recipe", "-r", "recipes", multiple=True, help="Recipe to try; repeatable.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Keep the checkpoints in this directory."
)
@json_option
@pass_app
def demo(app: App, recipes: tuple[str, ...], output: Path | None) -> None:
    """Quantize the demo model with three recipes, export it, and reload each in transformers.

    The model is a small Llama trained on the Python standard library. Perplexity is measured on
    held-out text: of the original, of the quantized model in memory, and of the checkpoint in a
    fresh process. Needs no network.

    Example: bittern demo --recipe int8 --output demo-out
    """
    from bittern.exporting import check_output, staged_directory

    names = recipes or RECIPES
    if output is None:
        with tempfile.TemporaryDirectory(prefix="bittern-demo-") as folder:
            rows = [_one(app, name, Path(folder) / name) for name in names]
    else:
        check_output(output)
        with staged_directory(output) as stage:
            rows = [_one(app, name, stage / name) for name in names]
    if app.json:
        app.emit({"model": "demo", "recipes": rows})
    else:
        _show(app.console, rows, output)


def _one(app: App, recipe: str, path: Path) -> dict[str, Any]:
    """Quantize a fresh copy of the demo model and follow it to the client."""
    from bittern.records import DataConfig, LoadConfig
    from bittern_huggingface.compressed.reload import perplexity_after_reload

    tools = app.toolkit
    app.say(f"{recipe}: quantizing")
    model = tools.load(str(DEMO / "model"), LoadConfig(device="cpu"))
    data = tools.data(DEMO / "calibration.txt", model, DataConfig(samples=64))
    heldout = tools.data(DEMO / "heldout.txt", model, DataConfig())
    result = tools.quantize(model, recipe, data)
    app.say(f"{recipe}: measuring perplexity")
    quality = tools.evaluate(model, heldout, layers=False)
    app.say(f"{recipe}: exporting, reloading in a fresh process")
    report = tools.export(model, path, verify=False, data=data)
    return {
        "recipe": recipe,
        "perplexity_before": quality.reference_perplexity,
        "perplexity_after": quality.perplexity,
        "perplexity_reloaded": perplexity_after_reload(
            path, heldout.rows, expected=quality.perplexity
        ),
        "bytes_before": (DEMO / "model" / "model.safetensors").stat().st_size,
        "bytes_after": sum(s for f, s in report.files.items() if f.endswith(".safetensors")),
        "bits_per_weight": result.plan.effective_bits,
    }


def _show(console: Console, rows: list[dict[str, Any]], output: Path | None) -> None:
    from rich.table import Table

    from bittern.report.console import human_bytes

    table = Table(title="a 1.4 M parameter Llama, perplexity on held-out text")
    for column in ("recipe", "before", "after", "reloaded", "change", "from", "to", "bits"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in rows:
        change = row["perplexity_after"] / row["perplexity_before"] - 1
        table.add_row(
            row["recipe"],
            f"{row['perplexity_before']:.4f}",
            f"{row['perplexity_after']:.4f}",
            f"{row['perplexity_reloaded']:.4f}",
            f"{change:+.2%}",
            human_bytes(row["bytes_before"]),
            human_bytes(row["bytes_after"]),
            f"{row['bits_per_weight']:.2f}",
        )
    console.print(table)
    console.print(
        "reloaded = transformers + compressed-tensors in a fresh process, without bittern; "
        "embeddings stay in bfloat16"
    )
    if output is not None:
        console.print(f"checkpoints: {output}")
