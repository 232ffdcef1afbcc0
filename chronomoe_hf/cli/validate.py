"""``chronomoe validate``: every fault of a state directory or of a run, named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chronomoe_hf.cli.output import FOUND, JsonOption, print_json
from chronomoe_hf.errors import ChronoError, StateError

if TYPE_CHECKING:
    from chronomoe_hf.telemetry.check import Fault

# Our tensor files, of this version and of earlier ones. Without the manifest beside them nothing was committed.
TENSOR_FILES = ("chronomoe/state.tensors", "chronomoe/state.safetensors", "chronomoe.safetensors")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(validate)


def validate(
    path: Annotated[Path, typer.Argument(help="A checkpoint or model directory with a state, or a run's output_dir.")],
    as_json: JsonOption = False,
) -> None:
    """Check hashes, schema and every line of a state directory or a run; exits with 3 where something is wrong."""
    from chronomoe_hf.telemetry.check import record_faults
    from chronomoe_hf.telemetry.views import plain_text

    if not path.is_dir():
        raise ChronoError(f"there is no directory {path}")
    if path.name == "chronomoe" and (path / "state.json").exists():
        path = path.parent
    faults: list[Fault] = []
    looked_at: list[str] = []
    records = next((d for d in (path / "chronomoe", path) if any(d.glob("*.jsonl"))), None)
    if records is not None:
        found, count = record_faults(records)
        faults += found
        looked_at.append(f"{count} records in {records}")
    for directory in state_directories(path):
        faults += state_faults(directory)
        looked_at.append(f"the state in {directory}")
    if not looked_at:
        raise ChronoError(
            f"neither records nor a state of chronomoe_hf in {path}; give a run's output_dir or a checkpoint"
        )
    if as_json:
        print_json(
            {
                "path": str(path),
                "looked_at": looked_at,
                "faults": [
                    {"file": fault.file, "line": fault.line, "what": plain_text(fault.what)} for fault in faults
                ],
            }
        )
    else:
        for line in (*looked_at, _counted(len(faults)), *map(str, faults)):
            print(plain_text(line))
    if faults:
        raise typer.Exit(FOUND)


def _counted(number: int) -> str:
    return "no fault found" if number == 0 else f"{number} fault{'' if number == 1 else 's'}"


def state_directories(path: Path) -> list[Path]:
    """`path` and the checkpoints in it, where they hold a state or a part of one."""
    steps = sorted((p for p in path.glob("checkpoint-*") if p.is_dir()), key=lambda p: (len(p.name), p.name))
    return [directory for directory in (path, *steps) if _has_state(directory)]


def _has_state(directory: Path) -> bool:
    manifests = ("chronomoe/state.json", "chronomoe.json")
    return any((directory / name).exists() for name in (*manifests, *TENSOR_FILES))


def state_faults(directory: Path) -> list[Fault]:
    """What keeps the state in `directory` from being loaded; empty for a sound one."""
    from chronomoe_hf.checkpoint.state_file import read_state
    from chronomoe_hf.telemetry.check import Fault

    try:
        read_state(directory)
    except StateError as error:
        return [Fault(str(directory), None, str(error))]
    return []
