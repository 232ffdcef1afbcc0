"""Which seeds of benchmarks/balance/run.py are for what, differences by seed, and what three seeds more say."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]
FRESH = (3, 4, 5)  # the targets are judged on these
MORE = (6, 7, 8)  # fresh too, run after that: how much of a miss is the noise of three seeds
_SPANS = {"first": FRESH, "more": MORE, "all": FRESH + MORE}


def by_seed(results: Row, setting: str, arm: str, seeds: tuple[int, ...] = FRESH) -> dict[int, Row]:
    """The arm's runs on these seeds, by seed."""
    rows = (run for run in results["runs"] if run["setting"] == setting and run["arm"] == arm)
    return {run["seed"]: run for run in rows if run["seed"] in seeds}


def paired(ours: dict[int, Row], theirs: dict[int, Row]) -> tuple[float, float, list[float]]:
    """Mean and standard error (0 for one seed) of the differences in validation loss by seed, and the differences."""
    each = [ours[seed]["valid_loss"] - theirs[seed]["valid_loss"] for seed in sorted(ours.keys() & theirs.keys())]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
    return statistics.fmean(each), error, each


def against_revive(results: Row) -> list[Row]:
    """`revive` minus every arm that ran on the further seeds: on the first fresh seeds, on these, and on all of them.

    Returns:
        Rows of setting, arm, the three spans (loss, error, differences by seed), whether `revive` is below by more than
        two standard errors of all, and the experts of `revive` without a token.
    """
    out = []
    for setting in results["settings"]:
        ours = {name: by_seed(results, setting, "revive", seeds) for name, seeds in _SPANS.items()}
        for arm in dict.fromkeys(run["arm"] for run in results["runs"] if run["setting"] == setting):
            theirs = {name: by_seed(results, setting, arm, seeds) for name, seeds in _SPANS.items()}
            if arm == "revive" or not all(ours[name].keys() & theirs[name].keys() for name in _SPANS):
                continue
            row: Row = {"setting": setting, "arm": arm, "dead": sum(run["dead_tail"] for run in ours["all"].values())}
            for name in _SPANS:
                row[name] = dict(zip(("loss", "error", "by_seed"), paired(ours[name], theirs[name]), strict=True))
            row["below"] = row["all"]["loss"] < -2.0 * row["all"]["error"]
            out.append(row)
    return out


def more_seeds(results: Row) -> list[str]:
    """The section about the further seeds, empty where there is none."""
    rows = against_revive(results)
    if not rows:
        return []
    return [
        "",
        "## Three seeds more",
        "",
        f"The targets are judged on seeds {', '.join(map(str, FRESH))}, as they were set. Seeds",
        f"{', '.join(map(str, MORE))} were run afterwards with everything unchanged, to see how much of a miss is the",
        "noise of three seeds. Loss of `revive` minus that of the other arm with the same seed: mean (standard error).",
        "Dead: experts of `revive` without a token in the last steps, over layers and all these seeds.",
        "",
        f"| setting | against | {_span(FRESH)} | {_span(MORE)} | by seed | all | below by two errors | dead |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['setting']} | {row['arm']} | {_shown(row['first'])} | {_shown(row['more'])} "
            f"| {' '.join(f'{each:+.4f}' for each in row['more']['by_seed'])} | {_shown(row['all'])} "
            f"| {'yes' if row['below'] else 'no'} | {row['dead']} |"
            for row in rows
        ),
    ]


def _span(seeds: tuple[int, ...]) -> str:
    return f"seeds {seeds[0]} to {seeds[-1]}"


def _shown(part: Row) -> str:
    return f"{part['loss']:+.4f} ({part['error']:.4f})"
