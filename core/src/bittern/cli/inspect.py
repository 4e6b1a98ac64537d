"""``bittern inspect``: what a directory holds, by its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bittern.cli.context import App, json_option, pass_app

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["inspect"]

EPILOG = """\b
Example:
  bittern inspect out/"""


@click.command(epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@pass_app
def inspect(app: App, *, directory: Path) -> None:
    """Say what a directory holds.

    DIR is an export or a saved state of bittern, a quantized checkpoint of another tool, or a
    plain model. Shows the recipe, what was done to the model, the formats by module, and the bytes
    by dtype; no tensor is loaded.
    """
    from bittern.cli.checkpoints import describe

    found = describe(directory)
    if app.json:
        app.emit(found)
        return
    from rich.markup import escape

    app.console.print(f"{escape(found['path'])}: {found['kind']}", highlight=False)
    _show_summary(app, found)
    _table(
        app,
        "formats",
        ("modules", "n", "slots"),
        ((f["modules"], f["count"], "\n".join(f["slots"])) for f in found["formats"]),
    )
    _show_tensors(app, found)


def _show_summary(app: App, found: dict[str, Any]) -> None:
    rows: list[tuple[str, Any]] = []
    bittern, quantization = found["bittern"], found["quantization"]
    if bittern is not None:
        modules, skipped = bittern["quantized_modules"], bittern["skipped_modules"]
        rows += [
            ("recipe", bittern["recipe"]),
            ("format", f"{bittern['format']}, written by bittern {bittern['version']}"),
            ("modules", f"{modules} quantized, {skipped} left as they are"),
        ]
        if bittern["probe_perplexity"] is not None:
            text = f"{bittern['probe_perplexity']:.4f} on {bittern['probe_rows']} rows"
            rows.append(("probe perplexity", text))
    if found["state"] is not None:
        rows += _state_rows(found["state"])
    for key, value in (found["model"] or {}).items():
        rows.append((key, ", ".join(map(str, value)) if isinstance(value, list) else value))
    if quantization is not None:
        rows.append(("quantization", quantization["method"]))
        for group in quantization["groups"]:
            targets = ", ".join(map(str, group["targets"] or ()))
            schemes = f"weights {group['weights']}, inputs {group['inputs']}"
            rows.append(("  group", f"{targets}: {schemes}"))
        if quantization["ignored"]:
            rows.append(("  ignored", ", ".join(map(str, quantization["ignored"]))))
    if found["pickled"]:
        rows.append(("not read", f"{', '.join(found['pickled'])} (pickle)"))
    _table(app, None, ("", ""), rows)


def _state_rows(state: dict[str, Any]) -> list[tuple[str, Any]]:
    content = "weights and quantizers" if state["weights"] else "quantizers only, no weights"
    rows = [("state", f"schema {state['schema']}, written by bittern {state['version']}")]
    rows.append(("holds", f"{content}, written by {state['tensors']}"))
    for mode in state["modes"]:
        options = ", ".join(f"{key}={value}" for key, value in mode["config"].items() if value)
        count = f", {mode['quantizers']} quantizers" if mode["quantizers"] else ""
        rows.append((f"mode {mode['name']}", f"{options or 'no options'}{count}"))
        calibration = mode["metadata"].get("calibration")
        if isinstance(calibration, dict) and calibration.get("batches"):
            data = calibration.get("data") or "data of a function"
            rows.append(("  calibrated", f"{calibration['batches']} batches, {data}"))
    if state["plugins"]:
        rows.append(("needs", ", ".join(f"{n} {v}" for n, v in state["plugins"].items())))
    return rows


def _show_tensors(app: App, found: dict[str, Any]) -> None:
    from bittern.report.console import human_bytes

    rows = (
        (t["tensors"], t["count"], t["dtype"], "x".join(map(str, t["shape"])), t["bytes"])
        for t in found["tensors"]
    )
    _table(
        app,
        "tensors",
        ("names", "n", "dtype", "shape", "size"),
        ((*row[:4], human_bytes(row[4])) for row in rows),
    )
    total = found["bytes"]
    if total:
        shares = [
            (dtype, human_bytes(size), f"{size / total:.1%}")
            for dtype, size in found["bytes_by_dtype"].items()
        ]
        _table(app, "bytes", ("dtype", "size", "share"), [*shares, ("all", human_bytes(total), "")])


def _table(
    app: App, title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=any(columns))
    for column in columns:
        right = column in ("n", "size", "share")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    if table.row_count:
        app.console.print(table)
