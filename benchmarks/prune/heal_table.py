"""Markdown of the healing, mid-run and balance rows of benchmarks/prune/run.py."""

from __future__ import annotations

import math
import statistics
from typing import Any

from prune.cells import Row, cell, shapes_of

HOWS = ("at the end", "at the end, refit", "at the end, random", "in the middle")
CUTS = (0.25, 0.5)


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def healing_lines(rows: list[Row]) -> list[str]:
    """Cut and trained on, against the dense model at the same number of steps."""
    if not rows:
        return []
    lines = [
        "## Healing, and a cut in the middle of fine-tuning",
        "",
        "Rise over the *dense model trained the same number of steps* on the same batches: at the end of fine-tuning,",
        "and after 100 more steps inside the mask (fresh AdamW, peak rate 5e-4). `in the middle` is the same run of",
        "fine-tuning, cut at its half by `lifecycle__cut__at=0.5`, planned from its own windows, without refit.",
        "",
    ]
    for shape in shapes_of(rows):
        dense = select(rows, shape=shape, how="dense")
        moved = ", ".join(f"{row['rise']:+.3f}" for row in dense)
        lines += [f"### {shape} (100 more steps move the dense loss by {moved})", ""]
        columns = [(cut, after) for cut in CUTS for after in (0, 100)]
        lines += ["| cut | " + " | ".join(f"{cut:.0%}, {after} steps more" for cut, after in columns) + " |"]
        lines += ["|" + " --- |" * (1 + len(columns))]
        for how in HOWS:
            cells = [cell(select(rows, shape=shape, how=how, cut=cut, after=after)) for cut, after in columns]
            lines.append(f"| {how} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def balance_lines(rows: list[Row], observed: list[Row]) -> list[str]:
    """The model that was fine-tuned under `balance` beside the one that was only observed."""
    if not rows:
        return []
    lines = [
        "## After `balance`",
        "",
        "The same fine-tuning under the balance law at its strongest (`beta.dead_zone=None`, all layers alike,",
        "`beta.rate=0.3`; its beta is kept) beside the observed one: rise over the own dense model.",
        "",
        "| shape | run | dense loss | rank | 12.5% | 25.0% | 50.0% | 25.0% + refit | 50.0% + refit |",
        "|" + " --- |" * 9,
    ]
    for shape in shapes_of(rows):
        seeds = {row["seed"] for row in select(rows, shape=shape)}
        for run, table in (("observed", [row for row in observed if row["seed"] in seeds]), ("balance", rows)):
            dense = select(table, shape=shape, rank="contribution", cut=0.25, refit=False)
            shown = " / ".join(f"{row['dense_loss']:.3f}" for row in dense)
            for rank in ("contribution", "reap"):
                cells = [
                    cell(select(table, shape=shape, rank=rank, cut=cut, refit=refit))
                    for cut, refit in ((0.125, False), (0.25, False), (0.5, False), (0.25, True), (0.5, True))
                ]
                lines.append(f"| {shape} | {run} | {shown} | {rank} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def healing_claims(rows: list[Row]) -> list[Row]:
    """Whether cutting in the middle beats cutting at the end, at the end of fine-tuning and after 100 more steps."""
    out = []
    for after, words in ((0, "at the end of fine-tuning"), (100, "after 100 more steps")):
        for other in ("at the end", "at the end, refit"):
            worse, numbers = [], []
            for shape in shapes_of(rows):
                for cut in CUTS:
                    wanted = {"shape": shape, "cut": cut, "after": after}
                    ours, theirs = select(rows, how="in the middle", **wanted), select(rows, how=other, **wanted)
                    if not ours or len(ours) != len(theirs):
                        continue
                    gaps = [a["rise"] - b["rise"] for a, b in zip(ours, theirs, strict=True)]
                    errors = [math.hypot(a["error"], b["error"]) for a, b in zip(ours, theirs, strict=True)]
                    error = statistics.fmean(errors) / math.sqrt(len(errors))
                    if len(gaps) > 1:
                        error = math.hypot(error, statistics.stdev(gaps) / math.sqrt(len(gaps)))
                    numbers.append(f"{shape} {cut:.0%}: {statistics.fmean(gaps):+.4f} +- {error:.4f}")
                    if statistics.fmean(gaps) > error:
                        worse.append(numbers[-1])
            if numbers:
                text = f"{words}, a cut in the middle costs no more than one {other} (beyond one standard error)"
                out.append({"claim": text, "holds": not worse, "numbers": "; ".join(numbers)})
    return out
