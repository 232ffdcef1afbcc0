"""What every command shares: exit codes, plain text on any terminal, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronomoe_hf.errors import TelemetryError

if TYPE_CHECKING:
    from rich.console import Console

FINE, FAILED, USAGE, FOUND, WATCH, ACT = 0, 1, 2, 3, 4, 5  # FOUND: alerts or faults were found
LEVEL_EXITS = {"healthy": FINE, "watch": WATCH, "act": ACT}  # of a verdict, with --check

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*%#"


def console(**options: Any) -> Console:
    """A rich console that takes no markup from what it prints: names in records stay text."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, **options)


def print_json(record: Any, *, indent: int | None = 2) -> None:
    """Strict JSON in ASCII on stdout, flushed, so that a reader at the other end of a pipe sees it at once."""
    print(json.dumps(record, indent=indent, allow_nan=False), flush=True)


def safe_streams() -> None:
    """Let a terminal that lacks a character show an escape for it, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def bars(encoding: str | None) -> str:
    """Eight characters from low to high that `encoding` can show."""
    try:
        BARS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII_BARS
    return BARS


def sparkline(values: list[float | None], low: float, high: float, blocks: str = BARS) -> str:
    """One character a value, on the fixed scale `low` to `high`; a blank where there is no evidence."""
    top = len(blocks) - 1
    spread = (high - low) or 1.0
    return "".join(
        " " if value is None else blocks[min(top, max(0, round(min(1.0, max(0.0, (value - low) / spread)) * top)))]
        for value in values
    )


def ranges(numbers: list[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# Finding the records of a run on disk.

RunDirectory = Annotated[Path, typer.Argument(help="A run's output_dir, or the chronomoe directory inside it.")]


def records_directory(run_dir: Path, name: str = "snapshots.jsonl") -> Path:
    """The directory that holds the record file `name`: `run_dir` itself or ``chronomoe`` in it.

    Raises:
        TelemetryError: neither has it.
    """
    for directory in (run_dir / "chronomoe", run_dir):
        if (directory / name).is_file():
            return directory
    if not run_dir.exists():
        raise TelemetryError(f"there is no directory {run_dir}")
    raise TelemetryError(
        f"no {name} in {run_dir} or {run_dir / 'chronomoe'}; a run writes one there when its first window closes "
        "(TelemetryConfig.jsonl)"
    )
