"""The ``chronomoe`` command: one file a command, each with ``register(app)``.

Nothing here imports torch, numpy or rich: a command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chronomoe_hf.cli import (
    candidates,
    export,
    inspect,
    measure,
    plan,
    profile,
    report,
    run,
    summary,
    tail,
    trace,
    validate,
)
from chronomoe_hf.cli.output import FAILED, safe_streams
from chronomoe_hf.errors import ChronoError

EPILOG = "Exit codes: 0 fine, 1 an error, 2 wrong usage, 3 alerts or faults were found, 4 watch, 5 act (a verdict)."

app = typer.Typer(
    help="Look at mixture-of-experts models and runs.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (inspect, profile, trace, run, tail, report, summary, candidates, plan, measure, export, validate):
    command.register(app)


def _version(asked: bool) -> None:
    if asked:
        from chronomoe_hf import __version__

        print(f"chronomoe_hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look at mixture-of-experts models and runs."""


def main() -> None:
    """Entry point: an error is one message and an exit code, not a traceback."""
    safe_streams()
    try:
        app()
    except (ChronoError, OSError) as error:
        print(f"error: {_plain(error)}", file=sys.stderr)
        raise SystemExit(FAILED) from None


def _plain(error: Exception) -> str:
    from chronomoe_hf.telemetry.views import plain_text

    return "\n".join(plain_text(line) for line in str(error).splitlines())
