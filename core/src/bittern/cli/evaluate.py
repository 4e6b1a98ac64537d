"""``bittern eval``: how good a model is."""

from __future__ import annotations

import click

from bittern.cli.context import App, json_option, pass_app
from bittern.cli.options import (
    batch_option,
    check_data_file,
    load_options,
    model_argument,
    seq_len_option,
)

__all__ = ["evaluate"]

EPILOG = """\b
Example:
  bittern eval MODEL --data heldout.txt"""


@click.command("eval", epilog=EPILOG)
@model_argument
@click.option("--data", required=True, help=".txt, .jsonl, .npy, or what a plugin reads.")
@click.option("--samples", type=click.IntRange(min=1), help="Rows at most; all by default.")
@seq_len_option
@batch_option
@load_options
@json_option
@pass_app
def evaluate(
    app: App,
    *,
    model: str,
    data: str,
    samples: int | None,
    seq_len: int | None,
    batch_size: int,
    dtype: str,
    device: str,
) -> None:
    """Measure how good a model is.

    MODEL is a directory or a hub name, quantized or not. Gives perplexity on token data, accuracy
    on labelled data.
    """
    from bittern.records import DataConfig, LoadConfig
    from bittern.report import plain

    check_data_file(data)
    toolkit = app.toolkit
    app.say(f"loading {model}")
    network = toolkit.load(model, LoadConfig(dtype=dtype, device=device))
    config = DataConfig(samples=samples, seq_len=seq_len, batch_size=batch_size)
    batches = toolkit.data(data, network, config)
    found = toolkit.evaluate(network, batches, progress=app.progress)
    if app.json:
        app.emit(plain(found) or {})
        return
    from bittern.report.console import show_evaluation

    show_evaluation(found, app.console)
