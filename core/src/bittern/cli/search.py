"""``bittern search``: which part of a model gets which recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bittern.cli.context import App, json_option, pass_app
from bittern.cli.options import (
    batch_option,
    check_data_file,
    load_options,
    model_argument,
    seq_len_option,
)
from bittern.errors import OutputError, PlanError

if TYPE_CHECKING:
    from bittern.search import SearchResult

__all__ = ["search"]

LIMIT = 2**28  # bytes of a table of latencies

EPILOG = """\b
Examples:
  bittern search MODEL --data text.txt --candidates nvfp4,fp8 --bits 5.5 --out mixed.yaml
  bittern quantize MODEL --recipe mixed.yaml --data text.txt --output out/"""


@click.command(epilog=EPILOG)
@model_argument
@click.option("--data", required=True, help=".txt, .jsonl, .npy, or what a plugin reads.")
@click.option(
    "--candidates",
    "-c",
    multiple=True,
    required=True,
    metavar="A,B",
    help="Recipes a part may get, names or YAML files; repeatable. To stay as it is comes on top.",
)
@click.option("--bits", type=float, help="At most this many stored bits per weight, on average.")
@click.option("--max-bytes", type=int, help="At most this many bytes of the whole model.")
@click.option("--max-seconds", type=float, help="At most this sum of --latency.")
@click.option(
    "--latency",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON: module to candidate (and none) to seconds.",
)
@click.option(
    "--method",
    type=click.Choice(["gradient", "kl", "layer"]),
    default="gradient",
    show_default=True,
    help="How sensitivity is measured: kl is the most exact, layer the fastest.",
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Modules left alone, not counted.")
@click.option("--keep", multiple=True, metavar="GLOB", help="Modules left alone, but counted.")
@click.option(
    "--together", multiple=True, metavar="GLOB", help="Modules that get one choice in each block."
)
@click.option(
    "--algorithm",
    multiple=True,
    metavar="A,B",
    help="Calibration steps of all candidates; their own by default.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the recipe as YAML."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the Pareto front as SVG.",
)
@click.option(
    "--scores",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep what was measured in this file, and go on from there.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Rows of data at most.",
)
@click.option(
    "--score-samples", type=click.IntRange(min=1), help="Rows that sensitivity is measured on."
)
@seq_len_option
@batch_option
@load_options
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of any sampling.")
@json_option
@pass_app
def search(
    app: App,
    *,
    model: str,
    data: str,
    candidates: tuple[str, ...],
    bits: float | None,
    max_bytes: int | None,
    max_seconds: float | None,
    latency: Path | None,
    method: str,
    exclude: tuple[str, ...],
    keep: tuple[str, ...],
    together: tuple[str, ...],
    algorithm: tuple[str, ...],
    out: Path | None,
    plot: Path | None,
    scores: Path | None,
    samples: int,
    score_samples: int | None,
    seq_len: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    seed: int,
) -> None:
    """Find which part of a model gets which recipe.

    MODEL is a directory or a hub name; it is not changed. What comes out is the best mix within a
    limit, as a recipe for `bittern quantize`, and what other limits would give.
    """
    from bittern.records import DataConfig, LoadConfig

    if bits is None and max_bytes is None and max_seconds is None:
        raise PlanError(
            "there is no limit to keep to", hint="give --bits, --max-bytes or --max-seconds"
        )
    check_data_file(data)
    for path in (out, plot, scores):
        _check_parent(path)
    toolkit = app.toolkit
    recipes = [toolkit.recipe(name) for name in _split(candidates)]
    app.say(f"loading {model}")
    network = toolkit.load(model, LoadConfig(dtype=dtype, device=device))
    rows = DataConfig(samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed)
    found = toolkit.auto_quantize(
        network,
        recipes,
        data,
        config=rows,
        bits=bits,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        latency=None if latency is None else _latencies(latency),
        method=method,
        exclude=exclude,
        keep=keep,
        together=together,
        algorithm=_split(algorithm) or None,
        score_batches=None if score_samples is None else -(-score_samples // batch_size),
        scores=scores,
        apply=False,
        progress=app.progress,
    )
    _write(found, out, plot)
    if app.json:
        app.emit(found.to_dict())
        return
    from bittern.search.console import show_search

    show_search(found, app.console)
    for path in filter(None, (out, plot)):
        app.console.print(f"wrote {path}", highlight=False)


def _split(texts: tuple[str, ...]) -> list[str]:
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def _check_parent(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise OutputError(
            "the directory of the file is not there", where=str(path), hint="create it first"
        )


def _latencies(path: Path) -> Mapping[str, Mapping[str, float]]:
    from bittern.reading import read_text

    hint = 'write {"module": {"candidate": seconds, "none": seconds}}'
    try:
        data: Any = json.loads(read_text(path, error=PlanError, limit=LIMIT))
    except ValueError as error:
        raise PlanError(f"it is no JSON: {error}", where=str(path), hint=hint) from error
    if not isinstance(data, dict) or not all(isinstance(row, dict) for row in data.values()):
        raise PlanError("it is no table of latencies", where=str(path), hint=hint)
    return data


def _write(found: SearchResult, out: Path | None, plot: Path | None) -> None:
    try:
        if out is not None:
            found.to_yaml(out)
        if plot is not None:
            found.to_svg(plot)
    except OSError as error:
        raise OutputError(
            f"it cannot be written: {error.strerror or error}", where=error.filename or None
        ) from error
