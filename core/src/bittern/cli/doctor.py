"""``bittern doctor``: is the installation well, and what mends it."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING, Any

import click

from bittern.cli.context import App, json_option
from bittern.cli.plugins import COLORS, record_dict

if TYPE_CHECKING:
    from bittern.toolkit import Toolkit

__all__ = ["doctor"]

ILL = ("failed", "duplicate", "partial", "core-incompatible", "target-incompatible")

EPILOG = """\b
Example:
  bittern doctor --json"""


@click.command(epilog=EPILOG)
@json_option
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check the installation, say how to mend it.

    Exit code 1 when a plugin is broken or does not fit; a plugin whose framework is not installed,
    or that was blocked, is not an ailment.
    """
    app = ctx.ensure_object(App)
    toolkit, refusal = app.lenient_toolkit()
    torch, gpus = _torch()
    problems = [*_problems(toolkit), *_rules(toolkit)]
    if refusal is not None:
        problems.insert(0, str(refusal))
    if torch["error"]:
        problems.insert(0, f"torch cannot be imported: {torch['error']}")
    found = {
        "ok": not problems,
        "bittern": _version(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": torch,
        "gpus": gpus,
        "environment": _environment(),
        "plugins": [record_dict(r) for r in toolkit.plugins.records],
        "problems": problems,
    }
    if app.json:
        app.emit(found)
    else:
        _show(app, found)
    if problems:
        ctx.exit(1)


def _version() -> str:
    from bittern._version import __version__

    return __version__


def _torch() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return torch's versions and the GPUs it sees; a torch that does not import is an ailment."""
    found: dict[str, Any] = {"version": None, "cuda": None, "error": None}
    try:
        import torch

        found["version"] = torch.__version__
        found["cuda"] = torch.version.cuda
        gpus = [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
                "bytes": torch.cuda.get_device_properties(i).total_memory,
            }
            for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ]
    except Exception as error:  # a broken driver or library raises anything
        found["error"] = f"{type(error).__name__}: {error}"
        return found, []
    return found, gpus


def _problems(toolkit: Toolkit) -> list[str]:
    problems = []
    for record in toolkit.plugins.records:
        if record.status in ILL:
            mend = f" ({record.remedy})" if record.remedy else ""
            problems.append(f"{record.label} is {record.status}: {record.reason}{mend}")
    return problems


def _rules(toolkit: Toolkit) -> list[str]:
    """Return what is wrong with the plugins' rules; their frameworks are imported to find out."""
    from bittern.errors import BitternError
    from bittern.registry import resolve, why_dead

    found = []
    for hook in ("register_modules", "register_symbols", "register_trace_leaves"):
        try:
            rules = [(r.target, who) for r, who, core in toolkit.plugins.collect(hook) if not core]
        except BitternError as error:
            found.append(error.what)
            continue
        for target, who in rules:
            try:
                why = "" if target == "*" else resolve(target, plugin=who) and why_dead(target)
            except BitternError as error:
                found.append(error.what)
                continue
            if why:
                found.append(f"the rule of {who} for {target} matches nothing: {why}")
    return list(dict.fromkeys(found))


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith("BITTERN_")}


def _show(app: App, found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    torch = found["torch"]
    table = Table(show_header=False)
    gpus = [f"{g['name']} (capability {g['capability']})" for g in found["gpus"]]
    rows = {
        "bittern": found["bittern"],
        "python": f"{found['python']} ({found['executable']})",
        "platform": found["platform"],
        "torch": torch["error"] or f"{torch['version']}, CUDA {torch['cuda'] or 'none'}",
        "GPU": "\n".join(gpus) or "none",
        "environment": "\n".join(f"{k}={v}" for k, v in found["environment"].items()) or "none",
    }
    for key, value in rows.items():
        table.add_row(key, escape(value))
    app.console.print(table)
    for plugin in found["plugins"]:
        label = f"{plugin['distribution']} {plugin['version']}".strip()
        color = COLORS.get(plugin["status"], "red")
        why = f": {escape(plugin['reason'])}" if plugin["reason"] else ""
        app.console.print(f"[{color}]{plugin['status']:>20}[/]  {escape(label)}{why}")
        if plugin["remedy"]:
            app.console.print(f"{'mend':>20}  {escape(plugin['remedy'])}", highlight=False)
    if not found["plugins"]:
        app.console.print("no plugin is installed")
    for problem in found["problems"]:
        app.console.print(f"[red]problem:[/] {escape(problem)}", highlight=False)
    app.console.print("[green]all is well[/]" if found["ok"] else "[red]something is ill[/]")
