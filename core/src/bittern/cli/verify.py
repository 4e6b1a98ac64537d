"""``bittern verify``: let a client that is not ours judge a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bittern.cli.context import App, json_option, pass_app
from bittern.errors import VerificationError

if TYPE_CHECKING:
    from bittern.records import Verification

__all__ = ["verdict_error", "verify"]

EPILOG = """\b
Example:
  bittern verify out/"""


@click.command(epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--client", help="Which client, where the format has several.")
@json_option
@pass_app
def verify(app: App, *, directory: Path, client: str | None) -> None:
    """Load a checkpoint in its client and compare.

    DIR is the output of an export, or a quantized checkpoint of another tool. Exit code 0 means
    that nothing is wrong with it.
    """
    from bittern.report import plain

    verdict = app.toolkit.verify(directory, client)
    if not app.json:
        from bittern.report.console import show_verification

        show_verification(verdict, app.console)
    error = verdict_error(verdict)
    if error is not None:
        app.fail(error, plain(verdict) or {})
    if app.json:
        app.emit(plain(verdict) or {})


def verdict_error(verdict: Verification) -> VerificationError | None:
    """Return the error that ends a command with a bad verdict; ``None`` for a good one."""
    if verdict.ok:
        return None
    count = len(verdict.findings)
    what = (
        f"{count} finding{'s' if count != 1 else ''}, {verdict.client} does not get what we wrote"
    )
    remedies = dict.fromkeys(finding.remedy for finding in verdict.findings)
    return VerificationError(
        f"not verified: {what}" if count else f"not verified by {verdict.client}",
        where=verdict.path,
        hint="; ".join([*list(remedies)[:2], "the directory stays for inspection"]),
    )
