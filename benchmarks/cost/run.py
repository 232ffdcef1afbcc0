"""What wrapping costs, beside what a user would write instead, and what it would cost large models.

Processor time, launches and host reads of a step, growing with layers, experts, width and tokens; bytes that ranks
exchange, counted in two processes; bytes of a window's records; bytes of state. From these, `launches.json` and
`shapes.json` a table for large models on many GPUs is computed, with its assumptions.

    python benchmarks/cost/run.py [--quick] [--rounds 15] [--output DIRECTORY]
    python benchmarks/cost/run.py --render    # the computed table and the page again, from the JSON files
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from cost import arms, launches, overhead, records, scale
from cost.table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"
BASE = launches.Shape(hidden=128, experts=16, top_k=2, batch=2, length=256)
LAYERS = 2
GROWTH: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8),
    "experts": (16, 64, 128),
    "hidden": (128, 256, 512),
    "tokens": (512, 2048, 4096),
}
CASES = [  # layers, experts, hidden, preset
    (2, 8, 32, "observe"),
    (3, 32, 32, "observe"),
    (2, 8, 32, "protect"),
    (3, 16, 64, "protect"),
    (2, 8, 32, "balance"),
]
RECORDS = {"Mixtral-8x22B": (56, 8, 2), "Qwen3-30B-A3B": (48, 128, 8), "DeepSeek-V3": (58, 256, 8)}
STATE = [(2, 8, 32), (4, 8, 32), (2, 24, 32), (2, 8, 96)]  # layers, experts, hidden; the fit, and one that checks it
STATE_CHECK = (5, 40, 64)


def grown(what: str, value: int) -> tuple[launches.Shape, int]:
    """The base shape with one thing at another value, and its layers."""
    if what == "layers":
        return BASE, value
    if what == "tokens":
        return dataclasses.replace(BASE, batch=value // BASE.length), LAYERS
    return dataclasses.replace(BASE, **{what: value}), LAYERS


def growth(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Processor time, launches and host reads at every value of every direction."""
    rows = []
    for what, values in GROWTH.items():
        for value in values[:1] if quick else values:
            if value == values[0] and rows:
                continue  # the base shape, once
            shape, layers = grown(what, value)
            row = {"grows": what, "value": value, "layers": layers, **dataclasses.asdict(shape)}
            rows.append(row | {"counts": arms.counted(shape, layers)})
    for row in rows:  # after all counts: the pretend device must be known before the first backward of a process
        row["time"] = arms.timed(*grown(row["grows"], row["value"]), rounds)
        print(json.dumps(row), flush=True)
    return rows


def collectives() -> list[dict[str, Any]]:
    """Bytes of every collective of a step, of two processes; beside each what the formula says.

    Raises:
        RuntimeError: the processes failed.
    """
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "found.json"
        worker = str(Path(__file__).resolve().parent / "worker.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker]
        done = subprocess.run(
            [*command, str(output), json.dumps(CASES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:])
        rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
    for row in rows:
        size = (row["layers"], row["experts"])
        row["formula_between"] = [scale.reduced_bytes(*size)]
        row["formula_window"] = scale.window_bytes(*size, row["hidden"], row["preset"] == "protect")
    return rows


def record_sizes() -> list[dict[str, Any]]:
    """Bytes that a window's records take on disk."""
    rows = []
    for name, (layers, experts, top_k) in RECORDS.items():
        sizes = []
        for windows in (2, 6):
            with tempfile.TemporaryDirectory() as place:
                records.write_run(Path(place), windows, layers, experts, top_k)
                sizes.append(sum(path.stat().st_size for path in (Path(place) / "chronomoe").iterdir()))
        rows.append({"shape of": name, "layers": layers, "experts": experts, "bytes": (sizes[1] - sizes[0]) // 4})
    return rows


def state() -> dict[str, dict[str, float]]:
    """Bytes of state by preset: fixed + L (per_layer + per_expert E + per_width D), checked on one more shape."""
    found = {}
    for preset in scale.PRESETS:
        sizes = {shape: _state_of(shape, preset) for shape in (*STATE, STATE_CHECK)}
        base, layered, wider, deeper = (sizes[shape] for shape in STATE)
        fit = {"per_expert": (wider - base) / (2 * 16), "per_width": (deeper - base) / (2 * 64)}
        rest = (layered - base) / 2
        fit["per_layer"] = rest - 8 * fit["per_expert"] - 32 * fit["per_width"]
        fit["fixed"] = base - 2 * rest
        layers, experts, hidden = STATE_CHECK
        said = fit["fixed"] + layers * (fit["per_layer"] + experts * fit["per_expert"] + hidden * fit["per_width"])
        found[preset] = {**fit, "checked": sizes[STATE_CHECK], "said": said}
    return found


def _state_of(shape: tuple[int, int, int], preset: str) -> int:
    layers, experts, hidden = shape
    model = launches.build(launches.Shape(hidden=hidden, experts=experts, top_k=2), layers)
    chronomoe_hf.wrap(model, ChronoConfig.preset(preset))
    return overhead.state_bytes(chronomoe_hf.system_of(model))


def add_scale(results: dict[str, Any], counted: Path, shapes: Path) -> None:
    """The computed table, from shapes.json and the last run of launches.json."""
    runs = json.loads(counted.read_text(encoding="utf-8"))["runs"]
    label = list(runs)[-1]
    results["launches_run"] = label
    results["scale"] = scale.table(
        json.loads(shapes.read_text(encoding="utf-8"))["rows"], runs[label], results["state"]
    )


def main() -> None:
    """Measure, compute, write, print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the base shape only, three rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--launches", type=Path, default=RESULTS / "launches.json")
    parser.add_argument("--shapes", type=Path, default=RESULTS / "shapes.json")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    path = options.output / "cost.json"
    if options.render:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        rounds = 3 if options.quick else options.rounds
        results = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rounds": rounds,
            "window": arms.WINDOW,
            "growth": growth(rounds, options.quick),
            "collectives": collectives(),
            "records": record_sizes(),
            "state": state(),
        }
    add_scale(results, options.launches, options.shapes)
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "cost.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
