"""The smallest closed loop runs by itself and reaches its five outcomes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "vertical_slice.py"
OUTCOMES = ("beta is applied", "one transfer", "low coherence lowers beta", "suppresses beta", "prune candidate")


def test_the_vertical_slice_reaches_its_five_outcomes() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = re.findall(r"^(PASS|FAIL) \((\d)\)", done.stdout, flags=re.M)
    assert verdicts == [("PASS", str(number)) for number in range(1, 6)], done.stdout
    for number, words in enumerate(OUTCOMES, start=1):
        assert re.search(rf"^PASS \({number}\).*{words}", done.stdout, flags=re.M), (number, words)
    table = re.findall(r"^ *(\d+) +\d+\.\d+ +\S+ +\S+ +([\d.]+) +\S+ +([\d.]+)", done.stdout, flags=re.M)
    assert [int(step) for step, _, _ in table] == list(range(10, 241, 10)), "one line per interval"
    assert float(table[-1][2]) > 0, "beta moved"
