"""Mismatch, k3 and the largest difference of a log-probability without replay, with R2 and with R3; four families.

    python benchmarks/replay/run.py [--seeds 2] [--steps 8] [--families ...] [--output DIRECTORY]

The engine is a copy of the policy in bf16, the trainer is in fp32. Writes ``results.json`` and ``results.md`` here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from grpo_replay import COMPLETION, Engine, build_tokenizer

from replay import job

HERE = Path(__file__).resolve().parent
MODES = ("measure", "old", "rollout")


def one(family: str, seed: int, steps: int) -> dict[str, Any]:
    """All modes on the same trained model."""
    model, found = job.trained(family, seed), {}
    for mode in MODES:
        policy = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as name:
            engine = Engine(policy, build_tokenizer(), shortest=COMPLETION)
            record = job.run(policy, mode, engine, Path(name), seed, steps)
        found[mode] = {
            "mismatch": {pair: each["mean"] for pair, each in record["pairs"].items()},
            "logps": record["logps"],
            "coverage": record["coverage"],
            "seconds_per_step": record["seconds_per_step"],
        }
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The committed page: means over seeds, largest over seeds for the maximum."""
    lines = [
        "# Routing replay in GRPO: four small models, an engine in bf16, a trainer in fp32",
        "",
        "Made by `python benchmarks/replay/run.py`. k3 in nats between the named passes; mismatch is the router's own",
        "choice, before anything is repeated. Means over seeds; the largest |dlogp| is the largest of all seeds.",
        "`old` compares the old-policy with the gradient pass: its rollouts are not recorded.",
        f"{len(next(iter(results.values()), []))} seed(s). The seconds are of the machine as it was: none that",
        "ran beside other work can be compared.",
        "",
        "| family | mode | mismatch rollout/old | k3 rollout/old | largest dlogp rollout/old "
        "| mismatch old/gradient | k3 old/gradient | s a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, runs in results.items():
        for mode in MODES:
            rows = [run[mode] for run in runs]
            cells = [
                _mean([row["mismatch"].get("rollout_old") for row in rows], "{:.2%}"),
                _mean([row["logps"].get("rollout_old", {}).get("k3") for row in rows], "{:.1e}"),
                _most([row["logps"].get("rollout_old", {}).get("logp_diff_max") for row in rows]),
                _mean([row["mismatch"].get("old_gradient") for row in rows], "{:.2%}"),
                _mean([row["logps"].get("old_gradient", {}).get("k3") for row in rows], "{:.1e}"),
                _mean([row["seconds_per_step"] for row in rows], "{:.2f}"),
            ]
            lines.append(f"| {family} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else "-"


def _most(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.3f}" if known else "-"


def main() -> None:
    """Run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--families", default=",".join(job.FAMILIES))
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for family in args.families.split(","):
        results[family] = [one(family, seed, args.steps) for seed in range(args.seeds)]
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "results.md").write_text(table(results))
        print(table({family: results[family]}).splitlines()[-3:], flush=True)


if __name__ == "__main__":
    main()
