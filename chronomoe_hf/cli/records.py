"""Finding the records of a run on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chronomoe_hf.errors import TelemetryError

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
