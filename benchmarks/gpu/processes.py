"""Parts of benchmarks/gpu/run.py that run in processes of their own: the tests that need a GPU, and several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gpu.base import Bench, Row

ROOT = Path(__file__).resolve().parents[2]


def suite(bench: Bench) -> list[Row]:
    """The tests that need a GPU."""
    own = ROOT / "tests" / "benchmarks"  # which run this script
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "cuda.is_available" in p.read_text("utf-8")]
    files = [path for path in files if own not in path.parents]
    rows = []
    for path in sorted(files):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rA",
            "-p",
            "no:cacheprovider",
            "-k",
            "gpu or device",
            str(path),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [
            line for line in done.stdout.splitlines() if line.split(" ")[0] in ("PASSED", "FAILED", "SKIPPED", "ERROR")
        ]
        result = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
        rows.append({"file": str(path.relative_to(ROOT)), "result": result.strip("= "), "tests": lines})
    return rows


def ranks(bench: Bench) -> list[Row]:
    """Two processes (NCCL with two GPUs): time of the one all-reduce of a step at large models' sizes."""
    processes = torch.cuda.device_count() if bench.device == "cuda" else 2
    if processes < 2:
        return [{"left_out": "one GPU: NCCL was not measured"}]
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        worker = str(Path(__file__).resolve().parent / "worker.py")
        done = subprocess.run(
            [*command, worker, bench.device, str(output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-1500:])
        found: list[Row] = json.loads(output.read_text(encoding="utf-8"))
        return found
