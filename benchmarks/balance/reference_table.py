"""What the controller of `protect` should owe debt for, a level or what the run lost: the table and what decides it."""

from __future__ import annotations

import statistics
from typing import Any

from balance.arms import REFERENCES

Row = dict[str, Any]
SEEDS = (9, 10, 11)  # used for nothing else: no default was tuned on them
LEVEL, BASELINE = REFERENCES


def claims(results: Row) -> list[Row]:
    """Whether `reference="baseline"` earns the default: a lower loss in one setting and a higher one in none.

    Args:
        results: what ``balance.run_matrix`` collects.
    """
    found = {setting: _paired(results, setting, BASELINE, LEVEL) for setting in results["settings"]}
    found = {setting: pair for setting, pair in found.items() if pair is not None}
    better = [setting for setting, (mean, error) in found.items() if mean < -2 * error]
    worse = [setting for setting, (mean, error) in found.items() if mean > 2 * error]
    numbers = "; ".join(f"{setting} {mean:+.4f} +- {error:.4f}" for setting, (mean, error) in found.items())
    text = "baseline lowers the loss of protect by two standard errors somewhere, and raises it so nowhere"
    return [{"claim": text, "holds": bool(better) and not worse, "numbers": numbers}]


def markdown(results: Row) -> str:
    """Per setting: both references beside `none`, paired by seed."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# What `protect` owes debt for",
        "",
        f"{versions}; {results['machine']}. Written by `benchmarks/balance/run.py --reference`,",
        "seeds 9 to 11, which no default was tuned on. Loss is validation loss minus that of `none` of the same",
        "seed, in nats, mean and standard error. Neff/E and dead experts are of the last 50 steps (mean over layers,",
        "worst layer; dead: summed over layers, mean over seeds). `narrow` is one kind of file out of the text of",
        "pretraining, k unchanged: nothing is wrong.",
        "",
        "| setting | arm | loss | Neff/E | worst Neff/E | dead |",
        "|---|---|---|---|---|---|",
    ]
    for setting in results["settings"]:
        lines += [_row(results, setting, arm) for arm in ("none", *REFERENCES)]
    lines += ["", "| setting | loss of baseline minus level |", "|---|---|"]
    for setting in results["settings"]:
        pair = _paired(results, setting, BASELINE, LEVEL)
        lines += [] if pair is None else [f"| {setting} | {pair[0]:+.4f} +- {pair[1]:.4f} |"]
    for claim in results["claims"]:
        lines += ["", f"{'Holds' if claim['holds'] else 'Does not hold'}: {claim['claim']}."]
    return "\n".join(lines) + "\n"


def _row(results: Row, setting: str, arm: str) -> str:
    rows = _of(results, setting, arm).values()
    if not rows:
        return f"| {setting} | {arm} | not run | | | |"
    pair = _paired(results, setting, arm, "none")
    loss = "0" if arm == "none" or pair is None else f"{pair[0]:+.4f} +- {pair[1]:.4f}"
    even = statistics.fmean(statistics.fmean(row["neff_tail"]) for row in rows)
    worst = statistics.fmean(min(row["neff_tail"]) for row in rows)
    dead = statistics.fmean(row["dead_tail"] for row in rows)
    return f"| {setting} | {arm} | {loss} | {even:.2f} | {worst:.2f} | {dead:.1f} |"


def _of(results: Row, setting: str, arm: str) -> dict[int, Row]:
    return {run["seed"]: run for run in results["runs"] if (run["setting"], run["arm"]) == (setting, arm)}


def _paired(results: Row, setting: str, arm: str, base: str) -> tuple[float, float] | None:
    """Mean and standard error of the differences in validation loss, seed by seed."""
    ours, theirs = _of(results, setting, arm), _of(results, setting, base)
    each = [ours[seed]["valid_loss"] - theirs[seed]["valid_loss"] for seed in sorted(ours.keys() & theirs.keys())]
    if len(each) < 2:
        return None
    return statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5
