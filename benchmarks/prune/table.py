"""Markdown, claims and plot of benchmarks/prune/run.py from its rows."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from prune.cells import Row, cell, pick, shapes_of
from prune.heal_table import balance_lines, healing_claims, healing_lines

CUTS = (0.125, 0.25, 0.5)
FACTOR = 4.0  # half of the experts with refit may cost at most 1 / FACTOR of REAP one-shot


def claims(rows: list[Row]) -> list[Row]:
    """Every claim that the rows can decide: text, whether it holds, and the numbers."""
    return [*_default_rank(rows), *_quarter(rows), *_prediction(rows)]


def _default_rank(rows: list[Row]) -> list[Row]:
    out = []
    for other in ("reap", "frequency"):
        worse, numbers = [], []
        for shape in shapes_of(rows):
            for cut in CUTS:
                ours = pick(rows, shape=shape, cut=cut, refit=False, rank="contribution")
                theirs = pick(rows, shape=shape, cut=cut, refit=False, rank=other)
                if not ours:
                    continue
                gaps = [a["rise"] - b["rise"] for a, b in zip(ours, theirs, strict=True)]
                error = _error(gaps, [a["error"] for a in ours])
                numbers.append(f"{shape} {cut:.1%}: {statistics.fmean(gaps):+.5f} +- {error:.5f}")
                if statistics.fmean(gaps) > error:
                    worse.append(numbers[-1])
        text = f"contribution is nowhere worse than {other} beyond one standard error, one-shot"
        out.append({"claim": text, "holds": not worse, "numbers": "; ".join(worse or numbers)})
    return out


def _error(gaps: list[float], single: list[float]) -> float:
    """Standard error of the mean gap: its spread over seeds, and the error of a seed's rise over its blocks."""
    over_seeds = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return math.hypot(over_seeds, statistics.fmean(single) / math.sqrt(len(gaps)))


def _quarter(rows: list[Row], where: str = "", ranks: tuple[str, ...] = ("contribution", "reap")) -> list[Row]:
    out = []
    for rank in ranks:
        bad, numbers = [], []
        for shape in shapes_of(rows):
            for seed in sorted({row["seed"] for row in rows}):
                ours = pick(rows, shape=shape, seed=seed, cut=0.5, refit=True, rank=rank)
                theirs = pick(rows, shape=shape, seed=seed, cut=0.5, refit=False, rank="reap")
                if ours and theirs:
                    cost, reap = ours[0]["rise"], theirs[0]["rise"]
                    share = f" ({cost / reap:.0%})" if reap > theirs[0]["error"] else ""
                    numbers.append(f"{shape} seed {seed}: {cost:.4f} of {reap:.4f}{share}")
                    # Where REAP itself costs nothing, a cost within its own error of nothing is none.
                    if cost > reap / FACTOR and (share or cost > ours[0]["error"]):
                        bad.append(numbers[-1])
        text = f"half of the experts cut by {rank}, with refit, costs at most a quarter of REAP one-shot{where}"
        out.append({"claim": text, "holds": not bad, "numbers": "; ".join(bad or numbers)})
    return out


def _prediction(rows: list[Row]) -> list[Row]:
    out = []
    for refit in (False, True):
        z, exported = [], 0
        for row in pick(rows, refit=refit, rank="contribution"):
            exported += "rise_exported" in row
            realised, error = (row.get(f"{name}_exported", row[f"{name}_realised"]) for name in ("rise", "error"))
            both = math.hypot(row["error_predicted"], error)
            z.append(abs(row["rise_predicted"] - realised) / both if both > 0 else 0.0)
        if z:
            within = sum(value <= 2.0 for value in z)
            text = f"predicted cost is within two standard errors of the realised one{', with refit' * refit}"
            numbers = (
                f"{within} of {len(z)}; largest {max(z):.1f} standard errors; {exported} of them exported checkpoints"
            )
            out.append({"claim": text, "holds": within == len(z), "numbers": numbers})
    return out


def markdown(results: Row) -> str:
    """The page."""
    rows = results["rows"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "# What cutting experts costs",
        "",
        "Written by `python benchmarks/prune/run.py`; the models, text and settings are described there.",
        "Every entry is the paired rise of the loss, nats per token, on 192 held-out blocks of the fine-tuning text:",
        f"the mean over seeds, and each seed ({', '.join(map(str, seeds))}). `random` is the mean of five draws (with",
        "refit: one). Predicted is on the even blocks, realised on the odd ones. `refit` rewrites",
        "the survivors' output projections from about 16,000 training tokens, without labels. The cut is a mask.",
        "`free budgets` drops as many experts by contribution, but not the same number in every layer: no stock config",
        "can hold such a model. `mean_norm` is read from 32 training blocks (`lifecycle.calibrate`).",
        "",
    ]
    lines += _rank_lines(rows)
    lines += healing_lines(results.get("healing", []))
    lines += balance_lines(results.get("balance", []), rows)
    if rows:
        lines += _claim_lines(results)
    lines += _setting_lines(results.get("settings", []))
    lines += _cost_lines(results["layer_cost"])
    lines += [
        f"{results['machine']}; " + ", ".join(f"{name} {value}" for name, value in results["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def _rank_lines(rows: list[Row]) -> list[str]:
    """A table per shape: ranks by sizes."""
    lines: list[str] = []
    ranks = ("contribution", "reap", "frequency", "mean_norm", "fisher", "phi", "random", "worst", "free budgets")
    for shape in shapes_of(rows):
        dense = [row["dense_loss"] for row in pick(rows, shape=shape, rank="contribution", cut=0.25, refit=False)]
        lines += [f"## {shape} (dense loss {', '.join(f'{value:.3f}' for value in dense)})", ""]
        lines += [
            "| rank | "
            + " | ".join(f"{cut:.1%}" for cut in CUTS)
            + " | "
            + " | ".join(f"{cut:.1%} + refit" for cut in CUTS)
            + " |"
        ]
        lines += ["|" + " --- |" * (1 + 2 * len(CUTS))]
        for rank in ranks:
            if not pick(rows, shape=shape, rank=rank):
                continue
            cells = [
                cell(pick(rows, shape=shape, cut=cut, rank=rank, refit=refit))
                for refit in (False, True)
                for cut in CUTS
            ]
            lines.append(f"| {rank} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _claim_lines(results: Row) -> list[str]:
    lines = ["## Claims", "", "| claim | holds | numbers |", "| --- | --- | --- |"]
    fresh = results.get("fresh", [])
    found = claims(results["rows"])
    for times, words in ((1, ""), (4, " from four times the text")) if fresh else ():
        used = [row for row in fresh if row.get("times", times) == times]
        found += _quarter(used, f", on fresh seeds, refit{words}", ("contribution",))
    found += healing_claims(results.get("healing", []))
    lines += [f"| {c['claim']} | {'yes' if c['holds'] else '**no**'} | {c['numbers']} |" for c in found]
    return [*lines, ""]


def _setting_lines(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["## Settings of the refit (half of the experts, by contribution, one seed)", ""]
    lines += [
        "| shape | layer by layer | ridge | sweeps | tokens | rise |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['shape']} | {'yes' if r['sequential'] else 'no'} | {r['ridge']} | {r['sweeps']} | {r['tokens']} | "
        f"{r['rise']:.4f} |"
        for r in rows
    ]
    return [*lines, ""]


def _cost_lines(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Refit of one layer",
        "",
        "CPU seconds of one thread, reading the tokens and the check included; memory of the whole process, and",
        "how much of it was there before (the model and the libraries). Weights and tokens are random.",
        "",
        "| layer | tokens | CPU seconds | peak memory, GB | before, GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {c['layer']} | {c['tokens']} | {c['seconds']:.0f} | {c['peak_gb']:.1f} | {c['before_gb']:.1f} |"
        for c in rows
    ]
    return [*lines, ""]


def plot(results: Row, path: Path) -> None:
    """Rise of the loss at half of the experts: random, REAP, contribution, and both after the refit, per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    bars = (("random", False), ("reap", False), ("contribution", False), ("reap", True), ("contribution", True))
    colours = ("#999999", "#d55e00", "#0072b2", "#e69f00", "#56b4e9")
    shapes = shapes_of(rows)
    figure, axes = pyplot.subplots(figsize=(9, 4))
    for index, ((rank, refit), colour) in enumerate(zip(bars, colours, strict=True)):
        values = [pick(rows, shape=shape, cut=0.5, rank=rank, refit=refit) for shape in shapes]
        heights = [statistics.fmean(row["rise"] for row in group) if group else 0.0 for group in values]
        places = [number + (index - 2) * 0.16 for number in range(len(shapes))]
        axes.bar(places, heights, 0.15, label=rank + " + refit" * refit, color=colour)
        for place, group in zip(places, values, strict=True):
            axes.plot([place] * len(group), [row["rise"] for row in group], "k.", markersize=3)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("rise of the loss, nats per token")
    axes.set_title("Half of the experts cut (dots: seeds)")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
