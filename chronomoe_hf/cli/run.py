"""``chronomoe run``: any training command, with every Trainer in it watched."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from chronomoe_hf.cli.output import USAGE
from chronomoe_hf.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings={"ignore_unknown_options": True})(run)


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to start, after --.")],
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="Preset; observe, unless one is given.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Instead: a config file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The last line as one JSON object, on stderr.")] = False,
) -> None:
    """Run a command and attach to every Trainer that it makes, without an edit of its script.

    For python, torchrun, accelerate launch, trl, axolotl, swift, llamafactory-cli: every process started with this
    environment. Leaves with the command's own exit code.
    """
    from chronomoe_hf.integrations.launch import environment
    from chronomoe_hf.integrations.settings import read_settings

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config exclude each other: a config file names its preset (contract)")
    settings = str(config.resolve()) if config is not None else preset or "observe"
    read_settings(settings, "--preset" if config is None else "--config")
    if command and command[0] == "--":
        command = command[1:]
    if not command:
        print("nothing to run: chronomoe run [--preset P] -- COMMAND", file=sys.stderr)
        raise typer.Exit(USAGE)
    with tempfile.TemporaryDirectory(prefix="chronomoe-run-") as folder:
        journal = Path(folder) / "journal.jsonl"
        code = _started(command, environment(settings, journal))
        _say(command, code, _read(journal), as_json)
    raise typer.Exit(code)


def _started(command: list[str], env: dict[str, str]) -> int:
    """Run it to its end; signals that reach us reach it. The code a shell would give."""
    try:
        process = subprocess.Popen(command, env=env)
    except OSError as error:
        raise ConfigError(f"cannot start {shlex.join(command)}: {error.strerror or error}") from None
    with _signals_go_to(process):
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue  # the terminal has sent it to the command too; it decides
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _signals_go_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    names = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    before = {
        number: signal.signal(number, forward) for name in names if (number := getattr(signal, name, None)) is not None
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(journal: Path) -> list[dict[str, Any]]:
    """The lines that the Trainers of the command have left, one a Trainer; several ranks may say the same."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in journal.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return list({json.dumps(line, sort_keys=True): line for line in lines}.values())


def _say(command: list[str], code: int, lines: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"exit_code": code, "trainers": lines}), file=sys.stderr)
        return
    for line in lines:
        if line.get("attached"):
            where = os.path.relpath(line["directory"])
            print(
                f"chronomoe: {line['trainer']}, {line['layers']} MoE layers, records in {where}/chronomoe; "
                f"see: chronomoe report {shlex.quote(where)}",
                file=sys.stderr,
            )
        else:
            print(f"chronomoe: {line.get('trainer')} was not watched: {line.get('reason')}", file=sys.stderr)
    if not lines and code == 0:
        print(
            f"chronomoe: {command[0]} ended without training with a Transformers Trainer in an environment that has "
            "chronomoe_hf, so nothing was watched; for a loop of your own: chronomoe_hf.wrap and system.step",
            file=sys.stderr,
        )
