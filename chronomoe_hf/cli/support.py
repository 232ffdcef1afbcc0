"""``chronomoe support``: the table of all families."""

from __future__ import annotations

import typer

from chronomoe_hf.cli.inspect import quiet
from chronomoe_hf.cli.output import JsonOption, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(support)


def support(as_json: JsonOption = False) -> None:
    """The Markdown table of all supported families."""
    quiet()
    from chronomoe_hf.wrapping.support import support_rows, support_table

    if as_json:
        print_json(support_rows())
    else:
        print(support_table(), end="")
