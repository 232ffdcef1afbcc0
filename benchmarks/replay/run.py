"""Mismatch, k3 and the largest difference of a log-probability without replay, with R2 and with R3; and their cost.

    python benchmarks/replay/run.py [--seeds 5] [--steps 8] [--families ...] [--rounds 20] [--output DIRECTORY]

The engine is a copy of the policy in bf16, the trainer is in fp32. Costs are processor time of one thread over the same
job that is left alone, with the same seed. About twenty minutes on two cores. Writes ``results.json`` and
``results.md`` here; ``--render`` makes the page again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch
from grpo_replay import COMPLETION, Engine, build_tokenizer

from replay import job, recompute

HERE = Path(__file__).resolve().parent
MODES = ("measure", "old", "rollout")
ARMS = (None, "off", *MODES)
Runs = dict[str, list[dict[str, Any]]]


def one(family: str, seed: int, steps: int) -> dict[str, Any]:
    """All modes on the same trained model, in an order of their own; beside them what each costs."""
    model, found, took = job.trained(family, seed), {}, {}
    for mode in random.Random(seed).sample(ARMS, len(ARMS)):
        policy = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as name:
            engine = Engine(policy, build_tokenizer(), shortest=COMPLETION)
            record = job.run(policy, mode, engine, Path(name), seed, steps)
        took[mode] = record["seconds_per_step"]
        if mode in MODES:
            found[mode] = {
                "mismatch": {pair: each["mean"] for pair, each in record["pairs"].items()},
                "logps": record["logps"],
                "coverage": record["coverage"],
            }
    cost = {mode: seconds / took[None] for mode, seconds in took.items() if mode is not None}
    return {**found, "cost": cost, "untouched_seconds": took[None]}


def page(results: dict[str, Any]) -> str:
    """The committed page: means over seeds with their standard errors, largest over seeds for the maximum."""
    runs: Runs = results["runs"]
    flips = sum(row["flips"] for row in results["recompute"])
    lines = [
        "# Routing replay in GRPO: four small models, an engine in bf16, a trainer in fp32",
        "",
        "Made by `python benchmarks/replay/run.py`. k3 in nats between the named passes; mismatch is the router's own",
        "choice, before anything is repeated. Means over seeds with their standard errors; the largest |dlogp| is the",
        "largest of all seeds. `old` compares the old-policy with the gradient pass: its rollouts are not recorded.",
        f"{len(next(iter(runs.values()), []))} seeds.",
        "",
        "| family | mode | mismatch rollout/old, % | k3 rollout/old, 1e-4 | largest dlogp rollout/old "
        "| mismatch old/gradient, % | k3 old/gradient, 1e-4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, rows in runs.items():
        for mode in MODES:
            cells = [
                _mean(rows, lambda row, mode=mode: row[mode]["mismatch"].get("rollout_old"), 100),
                _mean(rows, lambda row, mode=mode: row[mode]["logps"].get("rollout_old", {}).get("k3"), 1e4),
                _most([row[mode]["logps"].get("rollout_old", {}).get("logp_diff_max") for row in rows]),
                _mean(rows, lambda row, mode=mode: row[mode]["mismatch"].get("old_gradient"), 100),
                _mean(rows, lambda row, mode=mode: row[mode]["logps"].get("old_gradient", {}).get("k3"), 1e4),
            ]
            lines.append(f"| {family} | {mode} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## What it costs",
        "",
        "Processor time of a step of the whole job (rollouts, passes, optimizer) over the same job left alone, of",
        "the same seed; mean over seeds with its standard error. `observe` is the library without replay. These models",
        "are so small that what is fixed a layer weighs more than in any real one.",
        "",
        "| family | untouched step | observe | measure | old | rollout |",
        "|---|---|---|---|---|---|",
    ]
    for family, rows in runs.items():
        plain = statistics.mean(row["untouched_seconds"] for row in rows)
        cells = [_mean(rows, lambda row, mode=mode: row["cost"][mode], 1) for mode in ("off", *MODES)]
        lines.append(f"| {family} | {plain:.2f} s | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## What a recompute costs that is counted, or pinned",
        "",
        "A training step with activation checkpointing over the untouched model's of the same round, 1,024 tokens,",
        f"fp32: median, with its quartiles. Choices that a recompute made otherwise on this CPU: {flips}.",
        "",
        "| model | observe | and count | and pin |",
        "|---|---|---|---|",
    ]
    for shape in recompute.SHAPES:
        own = {row["arm"]: row for row in results["recompute"] if row["shape"] == shape}
        cells = [
            f"{own[arm]['ratio']:.3f} [{own[arm]['low']:.3f}, {own[arm]['high']:.3f}]" for arm in recompute.ARMS[1:]
        ]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], times: float) -> str:
    """``mean (standard error)`` of what is known, in so many parts of one."""
    known = [times * each for row in rows if (each := value(row)) is not None]
    if not known:
        return "-"
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return f"{statistics.mean(known):.2f} ({error:.2f})"


def _most(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.3f}" if known else "-"


def main() -> None:
    """Run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--families", default=",".join(job.FAMILIES))
    parser.add_argument("--rounds", type=int, default=20, help="of the recompute table")
    parser.add_argument("--render", action="store_true", help="only make the page from results.json")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    path = args.output / "results.json"
    if not args.render:
        torch.set_num_threads(1)
        recomputed = [row for shape in recompute.SHAPES for row in recompute.measure(shape, args.rounds)]
        results: dict[str, Any] = {"runs": {}, "recompute": recomputed}
        for family in args.families.split(","):
            one(family, 0, 1)  # the first run of a kind imports what it needs
            results["runs"][family] = [one(family, seed, args.steps) for seed in range(args.seeds)]
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(page(results), flush=True)
    (args.output / "results.md").write_text(page(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
