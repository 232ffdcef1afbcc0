"""What reviving idle experts takes at the shape of a real model: one layer of Qwen3-30B-A3B on the CPU.

Seconds of one core for the plan (forwards and the bias) and for applying it (copies and the refit of all 128 output
projections), and peak memory; 48 layers take 48 times the seconds, and memory for one layer at a time.

    python benchmarks/prune/split_cost.py [--tokens 16384] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle
from prune.layer_cost import SHAPE, one_layer

LENGTH, IDLE = 2048, 32  # tokens of a batch; experts that are made idle


def build(shape: dict[str, int]) -> Any:
    """One layer of that shape with random weights, a quarter of its experts idle."""
    model = one_layer(shape)
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate.weight
        gate[-(shape["num_experts"] * IDLE // 128) :] *= 0.3
    return chronomoe_hf.wrap(model, ChronoConfig.revive())


def measure(shape: dict[str, int], tokens: int, length: int = LENGTH) -> dict[str, Any]:
    """Plan and apply on that many random tokens."""
    model = build(shape)
    batches = [{"input_ids": torch.randint(0, 4096, (1, length))} for _ in range(max(2, tokens // length))]
    before_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.process_time()
    plan = lifecycle.plan_split(model, batches)
    planned = time.process_time()
    done = lifecycle.apply(model, plan)
    return {
        "shape": shape,
        "tokens": plan.tokens,
        "copies": plan.num_copies,
        "share_min": [min(plan.layers[0].share_before), min(plan.layers[0].share_after)],
        "plan_seconds": round(planned - started, 1),
        "apply_seconds": round(time.process_time() - planned, 1),
        "model_gb": round(before_gb, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "layer_error": [done.refits[0].error_before, done.refits[0].error_after] if done.refits else None,
        "refitted": bool(done.refits and done.refits[0].applied),
    }


def markdown(results: dict[str, Any]) -> str:
    """The table that is read; `results` as in the JSON."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    row = results["row"]
    lines = [
        "# What reviving idle experts costs",
        "",
        "One layer of Qwen3-30B-A3B's shape (128 experts, 8 a token, width 2048, experts of 768, bf16), one core of a",
        f"CPU, random weights with {IDLE} idle experts, random tokens. {results['machine']}; {versions}. Written by",
        "`benchmarks/prune/split_cost.py`, with `split_cost.json`.",
        "",
        "| tokens | copies | plan | apply, refit of all experts | process before | peak | error on held-out tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    error = row["layer_error"]
    shown = "-" if error is None else f"{error[0]:.3f} -> {error[1]:.3f}" + ("" if row["refitted"] else " (refused)")
    lines.append(
        f"| {row['tokens']:,} | {row['copies']} | {row['plan_seconds']} s | {row['apply_seconds']} s "
        f"| {row['model_gb']} GB | {row['peak_gb']} GB | {shown} |"
    )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it runs")
    parser.add_argument("--output", type=Path, help="directory for split_cost.json and split_cost.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tiny = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4}
    row = measure(tiny, 1024, 256) if options.tiny else measure(SHAPE, options.tokens)
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "row": row,
    }
    print(json.dumps(row))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "split_cost.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (options.output / "split_cost.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
