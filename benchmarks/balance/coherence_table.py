"""The table of the coherence study: what each form of the coherence law does to loss and evenness."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]


def markdown(results: Row) -> str:
    """Per setting: every arm's paired difference to `none`, evenness and dead experts, over the seeds at hand."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Coherence laws against laws driven by load",
        "",
        f"{versions}; {results['machine']}. Written by `benchmarks/balance/run.py --coherence`. Loss is",
        "validation loss minus that of `none` of the same seed, in nats. Neff/E and dead experts are of the last 50",
        "steps (dead: summed over layers, mean over seeds). eta: gain per update, every 10 steps. tau: the coherence",
        "that earns nothing. Sign -1 pushes coherent experts down. Cap: largest bias, in logit standard deviations.",
    ]
    for setting, shape in results["settings"].items():
        arms = list(dict.fromkeys(run["arm"] for run in results["runs"] if run["setting"] == setting))
        if "none" not in arms:
            continue
        lines += [
            "",
            f"## {setting}: E = {shape['size']['experts']}, k = {shape['top_k']}, {shape['steps']} steps",
            "",
            "| law | eta | tau | clock | sign | cap | loss by seed | worst Neff/E | dead |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(results, setting, arm) for arm in arms),
        ]
    return "\n".join(lines) + "\n"


def _row(results: Row, setting: str, arm: str) -> str:
    def of(name: str) -> dict[int, Row]:
        return {run["seed"]: run for run in results["runs"] if (run["setting"], run["arm"]) == (setting, name)}

    rows, none = of(arm), of("none")
    law, _, form = arm.partition("@")
    shape = form.split(",") if form else ["-"] * 5
    loss = " ".join(
        f"{rows[seed]['valid_loss'] - none[seed]['valid_loss']:+.4f}" for seed in sorted(rows.keys() & none)
    )
    worst = statistics.fmean(min(row["neff_tail"]) for row in rows.values())
    dead = statistics.fmean(row["dead_tail"] for row in rows.values())
    return f"| {law} | {' | '.join(shape)} | {loss} | {worst:.2f} | {dead:.1f} |"
