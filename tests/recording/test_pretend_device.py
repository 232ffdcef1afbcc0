"""The tests of the pretend device (``phantom_*.py``), each file in a process of its own.

Autograd makes its queues for the devices that there are at the first backward of a process, so the device must be
registered before any other test has run one. By hand: ``pytest tests/recording/phantom_placement.py``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("phantom_*.py"))


def run(name: str, marks: str) -> int:
    """Run one file; returns how many tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(HERE / name)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0


def test_there_are_files() -> None:
    assert FILES == ["phantom_launches.py", "phantom_placement.py", "phantom_shapes.py"]


@pytest.mark.parametrize("name", FILES)
def test_on_the_pretend_device(name: str) -> None:
    assert run(name, "not slow") >= 5


@pytest.mark.slow
def test_every_rule_on_the_pretend_device() -> None:
    assert run("phantom_placement.py", "slow") >= 5
