"""The claims of benchmarks/balance/run.py, checked against its runs, and the Markdown table."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]
TOLERANCE = 0.02  # nats of validation loss


def _of(results: Row, setting: str, arm: str) -> list[Row]:
    return [run for run in results["runs"] if run["setting"] == setting and run["arm"] == arm]


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _claim(text: str, holds: bool, numbers: str) -> Row:
    return {"claim": text, "holds": holds, "numbers": numbers}


def claims(results: Row) -> list[Row]:
    """Every claim that the runs at hand can decide: text, whether it holds, and the numbers.

    Args:
        results: what ``balance.run_matrix`` collects.
    """
    out: list[Row] = []
    for setting in results["settings"]:
        none, aux = _of(results, setting, "none"), _of(results, setting, "aux")
        balance, sign = _of(results, setting, "balance"), _of(results, setting, "sign")
        protect = _of(results, setting, "protect")
        if setting == "healthy":
            out += _healthy(none, protect)
            continue
        if balance and none:
            worst = [_mean(rows, "worst_neff_tail") for rows in (none, balance)]
            text = f"{setting}: balance ends with a higher worst Neff/E than none"
            out.append(_claim(text, worst[1] > worst[0], f"{worst[1]:.2f} against {worst[0]:.2f}"))
        if balance and sign:
            out += _against_sign(setting, balance, sign, results["sign_rate"][setting])
        if balance and aux:
            out += _loss_claims(setting, balance, aux)
        if protect and none:
            out += _protect(setting, protect, none)
    return out


def _paired(rows: list[Row], base: list[Row]) -> tuple[float, float, str]:
    """Mean and standard error of the differences in validation loss, seed by seed, and all of it in words."""
    ours, theirs = ({row["seed"]: row["valid_loss"] for row in each} for each in (rows, base))
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean = statistics.fmean(differences) if differences else 0.0
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    each = ", ".join(f"{value:+.4f}" for value in differences)
    return mean, error, f"{mean:+.4f} with standard error {error:.4f}; by seed {each}"


def _loss_claims(setting: str, balance: list[Row], aux: list[Row]) -> list[Row]:
    mean, error, numbers = _paired(balance, aux)
    text = f"{setting}: validation loss of balance at most {{}} above that with HF aux loss"
    return [
        _claim(text.format(TOLERANCE), mean <= TOLERANCE, numbers),
        _claim(text.format("one standard error"), mean <= error, numbers),
    ]


def _against_sign(setting: str, balance: list[Row], sign: list[Row], rate: float) -> list[Row]:
    needed = [[row["updates_to_reach"] for row in rows] for rows in (balance, sign)]
    pairs = list(zip(*needed, strict=False))
    # A run that never got there needs more updates than it had.
    holds = all(ours is not None and (theirs is None or 2 * ours <= theirs) for ours, theirs in pairs)
    violation = [_mean(rows, "max_violation_tail") for rows in (balance, sign)]
    return [
        _claim(
            f"{setting}: balance has Neff/E 0.9 in every layer after at most half the sign rule's updates",
            holds,
            f"{needed[0]} against {needed[1]} at the sign rule's best rate, {rate}",
        ),
        _claim(
            f"{setting}: balance ends with a max violation no worse than the sign rule's",
            violation[0] <= violation[1],
            f"{violation[0]:.2f} against {violation[1]:.2f}",
        ),
    ]


def _protect(setting: str, protect: list[Row], none: list[Row]) -> list[Row]:
    dead = [[row["dead_tail"] for row in rows] for rows in (protect, none)]
    worst = [[round(row["worst_neff_tail"], 2) for row in rows] for rows in (protect, none)]
    misses = [miss for row in protect for miss in row["floor_misses"]]
    open_dead = [sum(miss["dead"] for miss in row["floor_misses"] if not miss["abstained"]) for row in protect]
    explained = all(miss["abstained"] for miss in misses)
    reasons = sorted({reason for miss in misses for reason in miss["abstained"]})
    why = f"; layers below, or with a dead expert: {len(misses)}, abstained for {', '.join(reasons)}" if misses else ""
    losses = [row["valid_loss"] for row in none]
    spread = max(losses) - min(losses)
    difference, _, numbers = _paired(protect, none)
    return [
        _claim(
            f"{setting}: protect leaves no dead expert in a layer where it acts",
            not any(open_dead),
            f"{open_dead}, in layers where it abstains {[a - b for a, b in zip(dead[0], open_dead, strict=True)]}; "
            f"none leaves {dead[1]}",
        ),
        _claim(
            f"{setting}: protect ends with every layer at Neff/E 0.6 or more, or its decisions say why it abstained",
            explained,
            f"worst layer {worst[0]}; none {worst[1]}{why}",
        ),
        _claim(
            f"{setting}: validation loss of protect at most one seed spread above none",
            difference <= spread,
            f"spread {spread:.4f}; {numbers}",
        ),
    ]


def _healthy(none: list[Row], protect: list[Row]) -> list[Row]:
    if not none or len(none) != len(protect):
        return []
    none, protect = (sorted(rows, key=lambda row: row["seed"]) for rows in (none, protect))
    abstained = [row["decisions"].get("no_pressure", 0) for row in protect]
    total = [sum(row["decisions"].values()) for row in protect]
    until = [row["first_action"] or len(row["loss_bits"]) for row in protect]
    # The update of step n acts from step n + 1 on: the losses of steps 1 to n must agree.
    equal = [a["loss_bits"][:n] == b["loss_bits"][:n] for a, b, n in zip(none, protect, until, strict=True)]
    alerts = [kind for row in [*none, *protect] for kind in row["alerts"]]
    worst = min(row["worst_neff_window"] for row in none)
    return [
        _claim("healthy: protect abstains in every evaluation", abstained == total, f"{abstained} of {total}"),
        _claim("healthy: no alert", not alerts, f"{len(alerts)} alerts; lowest Neff/E of any window {worst:.2f}"),
        _claim("healthy: losses bit-equal to none until the first beta update", all(equal), f"first {until} steps"),
    ]


def markdown(results: Row) -> str:
    """The table, the sweep and the claims."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Balance, protection, and what they cost",
        "",
        f"{versions}; {results['machine']}. Seeds {', '.join(map(str, results['seeds']))} (each with its own base).",
        "Numbers are means over the seeds at hand; Neff/E, violation and dead experts are of the last "
        f"{results['measures']['tail']} steps, in",
        "the worst layer. Updates = optimizer steps until every layer averages Neff/E of at least 0.9 over "
        f"{results['measures']['smooth']} steps. Written by",
        "`benchmarks/balance/run.py`; settings, per-seed numbers and Neff of every window are in `balance.json`.",
    ]
    for setting, shape in results["settings"].items():
        size = shape["size"]
        lines += [
            "",
            f"## {setting}: E = {size['experts']}, k = {size['top_k']} -> {shape['top_k']}, "
            f"prose -> {shape['domain']}, {shape['steps']} steps, control every {shape['interval']}",
            "",
            "| arm | seeds | validation loss | worst Neff/E | max violation, train / held | dead | updates | acted |",
            "|---|---|---|---|---|---|---|---|",
        ]
        arms = dict.fromkeys(run["arm"] for run in results["runs"] if run["setting"] == setting)
        lines += [_table_row(results, setting, arm) for arm in arms if arm not in results["changed"]]
    if results["sweep"]:
        lines += [
            "",
            "## Sign rule, sweep of its rate",
            "",
            "| setting | rate | updates | max violation | worst Neff/E |",
        ]
        lines.append("|---|---|---|---|---|")
        for row in results["sweep"]:
            reach = row["updates_to_reach"] or f"> {row['steps']}"
            lines.append(
                f"| {row['setting']} | {row['rate']} | {reach} | {row['max_violation_tail']:.2f} "
                f"| {row['worst_neff_tail']:.2f} |"
            )
    lines += _changed_table(results)
    lines += _spread_table(results)
    lines += ["", "## Claims", ""]
    lines += [f"- {'holds' if c['holds'] else '**fails**'}: {c['claim']}: {c['numbers']}" for c in results["claims"]]
    return "\n".join(lines) + "\n"


def _changed_table(results: Row) -> list[str]:
    """`protect` with one part changed, beside `protect` itself."""
    lines = []
    for setting in results["settings"]:
        arms = [arm for arm in results["changed"] if _of(results, setting, arm)]
        if not arms:
            continue
        lines += ["", f"## {setting}: protect with one thing changed, by seed", ""]
        heads = ("changed", "validation loss above none", "worst Neff/E", "of steered layers", "dead", "acted", "harm")
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        none = _of(results, setting, "none")
        for arm in ("protect", *arms):
            rows = _of(results, setting, arm)
            mean, _, by_seed = _paired(rows, none)
            cells = (
                f"{mean:+.4f} ({by_seed.partition('by seed ')[2]})",
                " ".join(f"{row['worst_neff_tail']:.2f}" for row in rows),
                " ".join(_worst_steered(row) for row in rows),
                " ".join(str(row["dead_tail"]) for row in rows),
                " ".join(str(row["decisions"].get("acted", 0)) for row in rows),
                " ".join(str(row.get("harmed", "-")) for row in rows),
            )
            lines.append(f"| {'nothing' if arm == 'protect' else arm} | " + " | ".join(cells) + " |")
    return lines


def _worst_steered(row: Row) -> str:
    """Worst Neff/E of the layers whose lens was open at some time."""
    scales = row.get("lens_scale", [])
    steered = [neff for neff, scale in zip(row["neff_tail"], scales, strict=True) if scale > 0] if scales else []
    return f"{min(steered):.2f}" if steered else "-"


def _spread_table(results: Row) -> list[str]:
    """By layer: standard deviation over mean of what the lens's reader reads from tokens it was not fitted on."""
    rows = [run for run in results["runs"] if run.get("lens_spread") and run["arm"] in ("protect", "reader mean")]
    if not rows:
        return []
    width = max(len(row["lens_spread"]) for row in rows)
    lines = ["", "## Spread of the lens's reader, median over the evaluations of a run; all seeds", ""]
    lines += [
        "| setting | arm | " + " | ".join(f"layer {layer}" for layer in range(width)) + " |",
        "|---" * (2 + width) + "|",
    ]
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in rows):
        layers = zip(*(row["lens_spread"] for row in _of(results, setting, arm)), strict=True)
        cells = [" ".join(f"{value:.2f}" for value in layer) for layer in layers]
        lines.append(f"| {setting} | {arm} | " + " | ".join(cells) + " |")
    return lines


def _table_row(results: Row, setting: str, arm: str) -> str:
    rows = _of(results, setting, arm)
    rate = f" at {results['sign_rate'][setting]}" if arm == "sign" else ""
    reach = " ".join(str(row["updates_to_reach"] or "-") for row in rows)
    acted = sum(row["decisions"].get("acted", 0) for row in rows)
    evaluations = sum(sum(row["decisions"].values()) for row in rows)
    share = f"{acted} of {evaluations}" if arm == "protect" and evaluations else "-"
    return (
        f"| {arm}{rate} | {len(rows)} | {_mean(rows, 'valid_loss'):.4f} | {_mean(rows, 'worst_neff_tail'):.2f} "
        f"| {_mean(rows, 'max_violation_tail'):.2f} / {_mean(rows, 'max_violation_valid'):.2f} "
        f"| {sum(row['dead_tail'] for row in rows)} | {reach} | {share} |"
    )
