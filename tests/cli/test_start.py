"""The command starts without torch, says its version, and leaves with the codes it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.made_runs import random_run

import chronomoe_hf
from chronomoe_hf.cli.main import app

MAIN = "from chronomoe_hf.cli.main import main; main()"
HEAVY = ("torch", "transformers", "datasets", "accelerate", "pandas")


def start(*arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, stdout and the heavy libraries that the command loaded."""
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(*[m for m in {HEAVY!r} if m in sys.modules], sep=',', file=sys.stderr))\n{MAIN}"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, set(filter(None, (done.stderr.strip().splitlines() or [""])[-1].split(",")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    random_run(directory)
    return directory


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["tail", "--help"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code, out, heavy = start(*command)
    assert code == 0 and heavy == set() and out


@pytest.mark.parametrize("command", ["tail", "candidates", "validate", "report"])
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_command_that_reads_records_loads_no_torch(command: str, option: list[str], made: Path) -> None:
    code, out, heavy = start(command, str(made), *option)
    assert code == 0 and heavy == set()
    if option:
        json.loads(out)


def test_the_version_is_the_packages() -> None:
    assert start("--version")[1].split() == ["chronomoe_hf", chronomoe_hf.__version__]


def test_a_shell_can_complete() -> None:
    assert {"--install-completion", "--show-completion"} <= set(start("--help")[1].split())


def test_every_command_has_json() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    assert {"inspect", "tail", "candidates", "validate", "support"} <= set(names)
    for name in names:
        assert "--json" in start(name, "--help")[1], name


def test_exit_codes() -> None:
    assert start("no-such-command")[0] == 2
    assert start("tail", "/nowhere/at/all")[0] == 1
    assert start("validate", "/nowhere/at/all")[0] == 1
