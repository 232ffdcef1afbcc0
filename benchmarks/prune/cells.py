"""Rows of benchmarks/prune/run.py picked out, and a cell of its tables."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]


def pick(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows with these values; ``rank="random"`` means every random plan."""
    rank = wanted.pop("rank", None)
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if rank is None:
        return found
    return [row for row in found if row["rank"] == rank or (rank == "random" and row["rank"].startswith("random"))]


def shapes_of(rows: list[Row]) -> list[str]:
    """Shapes in the order of their first row."""
    return list(dict.fromkeys(row["shape"] for row in rows))


def cell(rows: list[Row]) -> str:
    """Mean over seeds, and each seed."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row["rise"])
    means = [statistics.fmean(values) for _, values in sorted(by_seed.items())]
    if not means:
        return "-"
    each = " / ".join(f"{value:.3f}" for value in means)
    return f"**{statistics.fmean(means):.3f}** ({each})"
