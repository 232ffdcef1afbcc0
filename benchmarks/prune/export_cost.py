"""What a smaller checkpoint costs: time against copying the files, and memory.

A checkpoint of about 1 GB (Qwen3-MoE layers, bf16, several files) is made on the spot, half of its experts are cut, and
every way to do it runs in a process of its own, `REPEATS` times, in turn:

- ``copy``: the directory is copied, file by file, and synced to the disk as an export is; the yardstick
- ``files``: `export_checkpoint`, names and shapes checked
- ``files, logits``: the same, and both checkpoints loaded to compare logits
- ``live``: `export` of the loaded model (loading it is not counted)

Time is that of the call; memory is the peak of the process, and what it had before the call.

    python benchmarks/prune/export_cost.py            # writes benchmarks/results/export_cost.{json,md}
    python benchmarks/prune/export_cost.py --layers 1 # a quick look, prints only
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from chronomoe_hf import lifecycle
from chronomoe_hf.lifecycle import EvidenceSource, PlannedLayer, PrunePlan

WAYS = ("copy", "files", "files, logits", "live")
REPEATS = 5
LAYERS = 3
RESULTS = Path(__file__).resolve().parents[1] / "results"
TIME_LIMIT, MEMORY_LIMIT = 3.0, 2.0  # times the copy; GB
FIELDS = ("seconds", "peak_gb", "before_gb")


def build(directory: Path, layers: int) -> int:
    """Save the checkpoint and its plan; returns its bytes."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32_000,
        hidden_size=1024,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(directory, max_shard_size="400MB")
    planned = [
        PlannedLayer(spec=spec, kept=tuple(range(spec.layer_id % 2, 64, 2)), scores=(None,) * 64)
        for spec in lifecycle.layer_specs(model)
    ]
    PrunePlan(layers=tuple(planned), rank="every second", source=EvidenceSource(kind="run")).save(
        directory.parent / "plan.json"
    )
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def one(way: str, root: Path) -> dict[str, float]:
    """One way, in this process."""
    source, out = root / "source", root / "out"
    plan = PrunePlan.load(root / "plan.json")
    model = Qwen3MoeForCausalLM.from_pretrained(source, dtype="auto") if way == "live" else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if way == "copy":
        copy(source, out)
    elif model is not None:
        lifecycle.export(model, plan, out)
    else:
        lifecycle.export_checkpoint(source, plan, out, check="logits" if way == "files, logits" else "shapes")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_gb": peak * 1024 / 1e9, "before_gb": before * 1024 / 1e9}


def copy(source: Path, out: Path) -> None:
    """Copy the files of a directory and sync them."""
    shutil.copytree(source, out)
    for path in out.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def measure(layers: int) -> dict[str, Any]:
    """Every way, in turn, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        command = [sys.executable, str(Path(__file__).resolve()), "--root", str(root)]
        size = int(call([*command, "--build", "--layers", str(layers)]))
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(REPEATS + 1):  # the first round warms the page cache and is left out
            for way in WAYS:
                found = json.loads(call([*command, "--way", way]))
                smaller = sum(file.stat().st_size for file in (root / "out").glob("*.safetensors"))
                if number:
                    runs[way].append({**found, "bytes": smaller})
                shutil.rmtree(root / "out")
    rows = []
    for way, found in runs.items():
        middle = {name: statistics.median(run[name] for run in found) for name in (*FIELDS, "bytes")}
        spread = [min(run["seconds"] for run in found), max(run["seconds"] for run in found)]
        rows.append({"way": way, **middle, "range": spread})
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}",
        "bytes": size,
        "repeats": REPEATS,
        "rows": rows,
    }


def call(command: list[str]) -> str:
    """The last line that a process prints."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def table(found: dict[str, Any]) -> str:
    """The Markdown page of a measurement."""
    copied = found["rows"][0]["seconds"]
    lines = [
        "# What an export costs",
        "",
        f"A Qwen3-MoE checkpoint of {found['bytes'] / 1e9:.2f} GB (bf16, 64 experts a layer, several files), half of "
        f"the experts cut. Median of {found['repeats']} runs, each in a process of its own, files in the page cache "
        f"and synced to the disk at the end. {found['machine']}.",
        "",
        "| | seconds (range) | times the copy | written, GB | peak of the process, GB | of it before the call |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = row["range"]
        lines.append(
            f"| {row['way']} | {row['seconds']:.2f} ({low:.2f} to {high:.2f}) | {row['seconds'] / copied:.2f} | "
            f"{row['bytes'] / 1e9:.2f} | {row['peak_gb']:.2f} | {row['before_gb']:.2f} |"
        )
    files = next(row for row in found["rows"] if row["way"] == "files")
    ratio = files["seconds"] / copied
    kept = "both kept" if ratio <= TIME_LIMIT and files["peak_gb"] <= MEMORY_LIMIT else "NOT kept"
    lines += [
        "",
        f"Limits for `files`: {TIME_LIMIT:.0f} times the copy and {MEMORY_LIMIT:.0f} GB; {kept} ({ratio:.2f} times, "
        f"{files['peak_gb']:.2f} GB, of which the libraries take {files['before_gb']:.2f}). `files, logits` is the "
        "default where memory allows: it also loads both checkpoints, one after the other, and is bound by that; "
        "memory counts mapped files. `live` holds the model, its smaller copy, and the copy that was loaded again.",
        "",
        "    python benchmarks/prune/export_cost.py",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write, or do one part of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.build:
        print(build(arguments.root / "source", arguments.layers))
    elif arguments.way:
        print(json.dumps(one(arguments.way, arguments.root)))
    else:
        found = measure(arguments.layers)
        print(table(found))
        if arguments.layers == LAYERS:
            (RESULTS / "export_cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (RESULTS / "export_cost.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
