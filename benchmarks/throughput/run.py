"""What balance is worth in time where experts are spread over ranks.

First two processes of Transformers' expert parallelism (gloo): a model whose routers prefer the first rank's experts,
at several strengths, trained with and without `balance`; time of a step against how uneven the load is. Then a model of
a step's time on 8 and 64 ranks, fed with the loads of a small model that is fine-tuned on another kind of text.

    python benchmarks/throughput/run.py [--quick] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from throughput import model
from throughput.table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPE = {"hidden": 256, "width": 512, "layers": 2, "experts": 16, "top_k": 2, "batch": 4, "length": 256}
QUICK = {"hidden": 32, "width": 32, "layers": 2, "experts": 8, "top_k": 2, "batch": 2, "length": 32}
SKEWS = (0.0, 1.0, 2.0)
RANKS = (8, 64)
SHARES = (0.3, 0.5, 0.7)


def run_ranks(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Two processes under torchrun.

    Raises:
        RuntimeError: they failed; with the end of what they printed.
    """
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / "job.json", Path(place) / "found.json"]
        files[0].write_text(json.dumps(job), encoding="utf-8")
        worker = str(Path(__file__).resolve().parent / "worker.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker]
        done = subprocess.run(
            [*command, *map(str, files)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:])
        found: list[dict[str, Any]] = json.loads(files[1].read_text(encoding="utf-8"))
        return found


def summarise(found: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """One row per arm of one skew."""
    rows = []
    for arm, steps in found["rows"].items():
        count_WLE = torch.tensor([step["counts"] for step in steps])
        settling = torch.tensor(found["settling"][arm])
        seconds = [step["seconds"] for step in steps]
        rows.append(
            {
                "skew": found["skew"],
                "arm": arm,
                "max_violation_start": round(model.max_violation(settling[:1]), 3),
                "max_violation": round(model.max_violation(count_WLE), 3),
                "busiest_rank": round(model.imbalance(count_WLE, 2), 3),
                "seconds": round(statistics.median(seconds), 4),
                "seconds_quartiles": [round(q, 4) for q in statistics.quantiles(seconds, n=4)[::2]],
                "busiest_cpu": round(statistics.median(max(step["cpu"]) for step in steps), 4),
                "tokens_per_s": round(tokens / statistics.median(seconds)),
            }
        )
    for row in rows[1:]:
        for name, of in (("seconds", lambda step: step["seconds"]), ("cpu", lambda step: max(step["cpu"]))):
            pairs = zip(found["rows"]["none"], found["rows"][row["arm"]], strict=True)
            ratios = [of(a) / of(b) for a, b in pairs]
            row[f"none_over_this_{name}"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    return rows


def fitted_share(rows: list[dict[str, Any]]) -> float:
    """f of 1 + f (I - 1), least squares over the processor time of the busiest rank, to 0.001.

    Times are compared within a skew only (over the last arm's): skews ran at different hours of a shared machine.
    """
    errors = {}
    for share in (step / 1000 for step in range(1001)):
        error = 0.0
        for row in rows:
            last = [each for each in rows if each["skew"] == row["skew"]][-1]
            said = model.relative_step(row["busiest_rank"], share) / model.relative_step(last["busiest_rank"], share)
            error += (row["busiest_cpu"] / last["busiest_cpu"] - said) ** 2
        errors[share] = error
    return min(errors, key=lambda share: errors[share])


def modelled(loads: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per number of ranks and arm."""
    rows = []
    for ranks in RANKS:
        for arm, counts in loads["counts"].items():
            count_WLE = torch.tensor(counts)
            load = model.imbalance(count_WLE, ranks)
            times = {f"{share:g}": round(model.relative_step(load, share), 3) for share in SHARES}
            violation = round(model.max_violation(count_WLE), 3)
            rows.append({"ranks": ranks, "arm": arm, "max_violation": violation, "load": round(load, 3), "step": times})
    return rows


def main() -> None:
    """Measure, write, print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, under a minute")
    parser.add_argument("--pairs", type=int, default=14, help="rounds of one step of each arm")
    parser.add_argument("--settle", type=int, default=120, help="small steps of each arm before the timed ones")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape = QUICK if options.quick else SHAPE
    pairs, settle = (3, 5) if options.quick else (options.pairs, options.settle)
    job = {"shape": shape, "skews": SKEWS[::2] if options.quick else SKEWS, "settle": settle, "pairs": pairs}
    found = run_ranks(job)
    tokens = 2 * shape["batch"] * shape["length"]
    rows = [row for each in found for row in summarise(each, tokens)]
    loads = model.recorded_loads(options.quick)
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a process",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": shape,
        "tokens": tokens,
        "pairs": pairs,
        "settle": settle,
        "local_experts": found[0]["local_experts"],
        "rows": rows,
        "fitted_share": round(fitted_share(rows), 3),
        "loads": {**loads, "window": model.WINDOW},
        "modelled": modelled(loads),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "throughput.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (options.output / "throughput.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
