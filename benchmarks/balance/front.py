"""The front of benchmarks/balance/run.py: loss against evenness, the targets judged on fresh seeds, the table."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from balance.arms import AUX
from balance.seeds import FRESH, MORE, by_seed, more_seeds, paired

Row = dict[str, Any]
STRESSED = ("e8", "e8-long", "e32", "e32-long")
UNCHANGED = ("healthy", "reverse", "qwen3", "deepseek")
OURS = ("balance", "revive")
RIVALS = ("none", *AUX, "sign 0.001", "sign")
WORST, FIRST_E32 = 0.9, 0.8  # Neff/E that the target asks for


class Point(NamedTuple):
    """One arm of one setting, over the fresh seeds that both it and `none` have.

    Attributes:
        arm: its name.
        seeds: how many.
        loss: mean validation loss minus that of `none`, nats; `error` is its standard error.
        by_seed: the differences.
        worst, first, later: mean over seeds of Neff/E in the worst, the first and the worst later layer.
        dead: experts without a token in the last steps, summed over layers and seeds.
        violation: mean over seeds of the max violation in the worst layer, in training.
    """

    arm: str
    seeds: int
    loss: float
    error: float
    by_seed: list[float]
    worst: float
    first: float
    later: float
    dead: int
    violation: float


def point(results: Row, setting: str, arm: str) -> Point | None:
    """The arm's place on the front, None where it has no fresh seed in common with `none`."""
    rows, none = by_seed(results, setting, arm), by_seed(results, setting, "none")
    shared = [rows[seed] for seed in sorted(rows.keys() & none.keys())]
    if not shared:
        return None
    loss, error, each = paired(rows, none)
    neff = [row["neff_tail"] for row in shared]
    return Point(
        arm,
        len(shared),
        loss,
        0.0 if arm == "none" else error,
        each,
        statistics.fmean(min(layers) for layers in neff),
        statistics.fmean(layers[0] for layers in neff),
        statistics.fmean(min(layers[1:]) for layers in neff),
        sum(row["dead_tail"] for row in shared),
        statistics.fmean(row["max_violation_tail"] for row in shared),
    )


def points(results: Row, setting: str) -> list[Point]:
    """Every arm of a setting that has fresh seeds, in the order of its runs."""
    arms = dict.fromkeys(run["arm"] for run in results["runs"] if run["setting"] == setting)
    return [found for arm in arms if (found := point(results, setting, arm)) is not None]


def front(arms: list[Point]) -> list[str]:
    """Arms that no other one beats in loss and evenness at once (means alone)."""
    return [
        one.arm
        for one in arms
        if not any(
            other.loss <= one.loss and other.worst >= one.worst and (other.loss, other.worst) != (one.loss, one.worst)
            for other in arms
        )
    ]


# ------------------------------------------------------------------------------------------------------------ targets


def targets(results: Row) -> list[Row]:
    """Every target that the runs at hand say something about: text, whether it holds, the numbers.

    `open` names the rivals that have not been run: without them a target that holds is not yet met.
    """
    out: list[Row] = []
    met: dict[str, list[bool]] = {}
    for arm in OURS:
        for setting in STRESSED:
            if setting in results["settings"] and (claim := _stressed(results, setting, arm)):
                out.append(claim)
                met.setdefault(arm, []).append(claim["holds"] and not claim["open"])
        for setting in UNCHANGED:
            if setting in results["settings"] and (claim := _unchanged(results, setting, arm)):
                out.append(claim)
    if any(len(each) == len(STRESSED) for each in met.values()):
        best = ", ".join(f"{arm} {sum(each)} of {len(each)}" for arm, each in met.items())
        text = "one preset meets the target in e8, e8-long, e32 and e32-long"
        out.append({"claim": text, "holds": any(sum(each) == len(STRESSED) for each in met.values()), "numbers": best})
    return out


def _stressed(results: Row, setting: str, arm: str) -> Row | None:
    here = point(results, setting, arm)
    if here is None or here.seeds < 2:
        return None
    rows = by_seed(results, setting, arm)
    margins, below = [], True
    for rival in RIVALS:
        other = by_seed(results, setting, rival)
        if len(rows.keys() & other.keys()) < 2:
            continue
        mean, error, _ = paired(rows, other)
        below &= mean < -2.0 * error
        margins.append(f"{rival} {mean:+.4f} ({error:.4f})")
    wide = setting.startswith("e32")
    even = here.later >= WORST and here.first >= FIRST_E32 if wide else here.worst >= WORST
    asked = (
        f"Neff/E {WORST} in every layer" if not wide else f"Neff/E {FIRST_E32} in the first and {WORST} in later layers"
    )
    rivals = ", ".join(margin.rpartition(" ")[0].rpartition(" ")[0] for margin in margins)
    absent = [rival for rival in ("aux 0.02", "sign") if len(rows.keys() & by_seed(results, setting, rival)) < 2]
    return {
        "open": absent,
        "claim": f"{setting}: {arm} ends below {rivals} by more than two standard errors, no dead expert, {asked}",
        "holds": bool(below and here.dead == 0 and even),
        "numbers": f"against {'; '.join(margins)}; dead {here.dead}; first {here.first:.2f}, later {here.later:.2f}; "
        f"{here.seeds} seeds",
    }


def _unchanged(results: Row, setting: str, arm: str) -> Row | None:
    here = point(results, setting, arm)
    if here is None or here.seeds < 2:
        return None
    idle = "nothing idle" if setting == "healthy" else "experts idle at the start"
    return {
        "claim": f"{setting} (k unchanged, {idle}): {arm} ends at most one standard error above none",
        "holds": here.loss <= here.error,
        "numbers": f"{here.loss:+.4f} ({here.error:.4f}); {here.seeds} seeds",
    }


# -------------------------------------------------------------------------------------------------------------- table


def markdown(results: Row) -> str:
    """The tables of every setting, the claims, and the way to the plot."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# What balance costs or pays",
        "",
        f"{versions}; {results['machine']}. Written by `benchmarks/balance/run.py`; settings, configs and",
        f"the numbers of every run are in `balance.json`. Fresh seeds {', '.join(map(str, FRESH))}, each with its own",
        "base and data order; no choice was made on them. Loss = validation loss at the end minus that of `none`,",
        "in nats: mean and standard error over the seeds. Neff/E, dead experts and max violation are of the last",
        "50 steps; dead is summed over layers and seeds. An arm is on the front if no other has a lower mean loss at a",
        "higher mean worst Neff/E. `balance 0.2` is the preset as it was in 0.2, `sign` the published rule at",
        f"{_rate(results)}, its best rate.",
    ]
    for setting, shape in results["settings"].items():
        lines += _setting_table(results, setting, shape)
    if results["claims"]:
        lines += ["", "## Targets", ""]
        lines += [f"- {_verdict(claim)}: {claim['claim']}: {claim['numbers']}" for claim in results["claims"]]
    lines += more_seeds(results)
    lines += _tuning(results)
    return "\n".join(lines) + "\n"


def _verdict(claim: Row) -> str:
    if claim["holds"] and claim.get("open"):
        return f"open, {' and '.join(claim['open'])} have not been run"
    return "met" if claim["holds"] else "**missed**"


def _rate(results: Row) -> str:
    return ", ".join(map(str, dict.fromkeys(results["sign_rate"].values()))) or "-"


def _setting_table(results: Row, setting: str, shape: Row) -> list[str]:
    arms = points(results, setting)
    if not arms:
        return []
    size, best = shape["size"], front(arms)
    none = statistics.fmean(row["valid_loss"] for row in by_seed(results, setting, "none").values())
    return [
        "",
        f"## {setting}: {shape['arch']}, E = {size['experts']}, k = {size['top_k']} -> {shape['top_k']}, "
        f"{shape['base_domain']} -> {shape['domain']}, {shape['steps']} steps; none ends at {none:.4f}",
        "",
        "| arm | loss (s.e.) | by seed | worst Neff/E | first layer | later layers | dead | max violation | front |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {one.arm} | {one.loss:+.4f} ({_error(one)}) | {' '.join(f'{each:+.4f}' for each in one.by_seed)} "
            f"| {one.worst:.2f} | {one.first:.2f} | {one.later:.2f} | {one.dead} | {one.violation:.2f} "
            f"| {'yes' if one.arm in best else ''} |"
            for one in arms
        ),
    ]


def _error(one: Point) -> str:
    return f"{one.error:.4f}" if one.arm == "none" or one.seeds > 1 else "one seed"


def _tuning(results: Row) -> list[str]:
    """Runs on the tuning seeds, one by one."""
    none = {(run["setting"], run["seed"]): run["valid_loss"] for run in results["runs"] if run["arm"] == "none"}
    rows = [run for run in results["runs"] if run["seed"] not in FRESH + MORE and run["arm"] != "none"]
    if not rows:
        return []
    lines = [
        "",
        "## Runs on the tuning seeds",
        "",
        "| setting | arm | seed | loss | first layer | later layers | dead |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for run in rows:
        base = none.get((run["setting"], run["seed"]))
        loss = "-" if base is None else f"{run['valid_loss'] - base:+.4f}"
        neff = run["neff_tail"]
        lines.append(
            f"| {run['setting']} | {run['arm']} | {run['seed']} | {loss} | {neff[0]:.2f} | {min(neff[1:]):.2f} "
            f"| {run['dead_tail']} |"
        )
    return lines
