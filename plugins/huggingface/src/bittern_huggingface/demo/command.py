"""``bittern demo``: the whole way of a model through the house, on the model that ships with it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

__all__ = ["DEMO", "demo"]

DEMO = Path(__file__).parent
RECIPES = ("int8", "fp8-dynamic", "int4")


@click.command(short_help="Quantize, export and reload the model that ships with bittern.")
@click.option("--recipe", "-r", "recipes", multiple=True, help="Recipe to try; repeatable.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Keep the checkpoints in this directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(recipes: tuple[str, ...], output: Path | None, as_json: bool) -> None:
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
            rows = [_one(name, Path(folder) / name, quiet=as_json) for name in names]
    else:
        check_output(output)
        with staged_directory(output) as stage:
            rows = [_one(name, stage / name, quiet=as_json) for name in names]
    if as_json:
        click.echo(json.dumps({"model": "demo", "recipes": rows}))
    else:
        _show(rows, output)


def _one(recipe: str, path: Path, *, quiet: bool) -> dict[str, Any]:
    """Quantize a fresh copy of the demo model and follow it to the client."""
    from bittern.errors import VerificationError
    from bittern.records import DataConfig, LoadConfig
    from bittern.toolkit import default_toolkit
    from bittern_huggingface.compressed.reload import perplexity_after_reload

    def say(text: str) -> None:
        if not quiet:
            click.echo(f"{recipe}: {text}")

    tools = default_toolkit()
    say("loading, quantizing")
    model = tools.load(str(DEMO / "model"), LoadConfig(device="cpu"))
    data = tools.data(DEMO / "calibration.txt", model, DataConfig(samples=64))
    heldout = tools.data(DEMO / "heldout.txt", model, DataConfig())
    result = tools.quantize(model, recipe, data)
    say("evaluating")
    quality = tools.evaluate(model, heldout, layers=False)
    say("exporting, reloading in a fresh process")
    report = tools.export(model, path, verify=False, data=data)
    verdict = tools.verify(path)
    if not verdict.ok:
        finding = verdict.findings[0]
        raise VerificationError(
            f"{finding.tensor_or_field}: {finding.problem}", where=recipe, hint=finding.remedy
        )
    return {
        "recipe": recipe,
        "perplexity_before": quality.reference_perplexity,
        "perplexity_after": quality.perplexity,
        "perplexity_reloaded": perplexity_after_reload(path, heldout.rows),
        "bytes_before": (DEMO / "model" / "model.safetensors").stat().st_size,
        "bytes_after": sum(s for f, s in report.files.items() if f.endswith(".safetensors")),
        "bits_per_weight": result.plan.effective_bits,
        "verified": verdict.ok,
    }


def _show(rows: list[dict[str, Any]], output: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from bittern.report.console import human_bytes

    table = Table(title="a 1.4 M parameter Llama, perplexity on held-out text")
    for column in ("recipe", "before", "quantized", "reloaded", "change", "weights", "bits"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in rows:
        change = row["perplexity_after"] / row["perplexity_before"] - 1
        table.add_row(
            row["recipe"],
            f"{row['perplexity_before']:.4f}",
            f"{row['perplexity_after']:.4f}",
            f"{row['perplexity_reloaded']:.4f}",
            f"{change:+.2%}",
            f"{human_bytes(row['bytes_before'])} -> {human_bytes(row['bytes_after'])}",
            f"{row['bits_per_weight']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "reloaded = transformers + compressed-tensors in a fresh process, without bittern; "
        "embeddings stay in bfloat16"
    )
    if output is not None:
        console.print(f"checkpoints: {output}")
