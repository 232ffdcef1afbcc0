"""Starts real processes: one for a plain run, several under torchrun; never longer than a test may take."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import Job, result_path

HERE = Path(__file__).parent
TESTS = HERE.parent
TIMEOUT_S = 150


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launch left behind.

    Attributes:
        returncode: of the launcher.
        output: stdout and stderr of all processes.
        results: by job, then by rank; a job that did not finish has none.
    """

    returncode: int
    output: str
    results: list[list[dict[str, Any]]]


def open_processes(
    script: Path, arguments: list[str], processes: int, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """`script` in `processes` processes, in a session of its own: killing its group ends them and nothing else."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = [str(HERE), str(TESTS), str(TESTS.parent / "examples"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [*command, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **(environment or {}),
        },
    )


def start(
    script: Path, arguments: list[str], processes: int, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run `script` to its end; returns the exit status and everything that was printed."""
    process = open_processes(script, arguments, processes, environment)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{script.name} did not end within {TIMEOUT_S} s:\n{output[-4000:]}")
    return process.returncode, output


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Launch]:
    """``launch(jobs, processes=2, check=True)``: run the jobs one after the other in fresh processes."""
    numbers = iter(range(1000))

    def run(jobs: list[Job], *, processes: int = 2, check: bool = True) -> Launch:
        if any(job.engine.startswith("zero") for job in jobs) and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed (pip install 'chronomoe_hf[deepspeed]')")
        path = tmp_path / f"jobs-{next(numbers)}.json"
        path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        returncode, output = start(HERE / "worker.py", [str(path)], processes)
        if check:
            assert returncode == 0, output[-6000:]
        results = []
        for job in jobs:
            files = [result_path(job.output_dir, rank) for rank in range(processes)]
            results.append([torch.load(file, weights_only=True) for file in files if file.is_file()])
            for file in files:
                file.unlink(missing_ok=True)  # a later launch into the same directory starts clean
        return Launch(returncode, output, results)

    return run


@pytest.fixture
def start_script() -> Callable[..., tuple[int, str]]:
    """``start_script(path, arguments, processes)`` -> (returncode, output)."""
    return start


@pytest.fixture
def open_script() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``open_script(path, arguments, processes)`` -> the running launcher; what is left of it is killed at the end."""
    opened: list[subprocess.Popen[str]] = []

    def open_one(*arguments: Any) -> subprocess.Popen[str]:
        opened.append(open_processes(*arguments))
        return opened[-1]

    yield open_one
    for process in opened:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
