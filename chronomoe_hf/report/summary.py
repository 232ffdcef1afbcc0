"""Many runs, a line each: the verdict's level and the numbers behind it."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronomoe_hf.errors import ChronoError
from chronomoe_hf.report.data import load_run
from chronomoe_hf.report.verdict import MACHINE_LEVELS, judge
from chronomoe_hf.telemetry.reader import DIRECTORY

COLUMNS = (
    "path",
    "run",
    "model",
    "level",
    "findings",
    "step",
    "neff_mean",
    "neff_mean_change",
    "neff_lowest",
    "dead_experts",
    "died_experts",
    "alerts",
    "alerts_urgent",
    "loss",
    "eval_loss",
    "age_s",
    "error",
)
_HELP = {
    "level": "0 healthy, 1 watch, 2 act, 3 unreadable",
    "step": "optimizer step of the last window",
    "neff_mean": "mean over layers of the fraction of the experts in effective use",
    "neff_mean_change": "its change since the run's baseline",
    "neff_lowest": "the same of the layer with the fewest",
    "dead_experts": "experts without a token in the last window",
    "died_experts": "experts that worked at the baseline and fell silent",
    "alerts": "alerts in force",
    "alerts_urgent": "of these, the ones that ask for action",
    "loss": "training loss as last logged",
    "eval_loss": "evaluation loss as last logged",
    "age_s": "seconds since the last window",
}
_LEVEL_NUMBERS = {"healthy": 0, "watch": 1, "act": 2}


@dataclass(frozen=True)
class Line:
    """One run.

    Attributes:
        values: by the names of COLUMNS; what is not known is None.
    """

    values: dict[str, Any]

    @property
    def level(self) -> str | None:
        """``"healthy"``, ``"watch"``, ``"act"``, or None for what cannot be read."""
        level = self.values["level"]
        return level if isinstance(level, str) else None


def find_runs(directories: Iterable[Path]) -> list[Path]:
    """Run directories in the given ones: themselves, and whatever lies below them; in order of their paths.

    Raises:
        ChronoError: a directory is missing, or there is no run in any of them.
    """
    found: set[Path] = set()
    given = list(directories)
    for directory in given:
        if not directory.is_dir():
            raise ChronoError(f"there is no directory {directory}")
        if directory.name == DIRECTORY and any(directory.glob("*.jsonl")):
            found.add(directory.parent)
            continue
        for folder in directory.rglob(DIRECTORY):
            if folder.is_dir() and any(folder.glob("*.jsonl")) and not any(p.name == "domains" for p in folder.parents):
                found.add(folder.parent)
    if not found:
        raise ChronoError(f"no run of chronomoe_hf below {', '.join(map(str, given))}; give output_dirs of runs")
    return sorted(found)


def summarise(path: Path, now: float | None = None) -> Line:
    """One line about a run directory; a run that cannot be read has a line that says why.

    Args:
        path: a run directory.
        now: seconds since the epoch, for the age; by default the present.
    """
    empty: dict[str, Any] = dict.fromkeys(COLUMNS)
    try:
        run = load_run(path)
        verdict = judge(run)
    except (ChronoError, OSError) as error:
        return Line({**empty, "path": str(path), "error": str(error)})
    numbers = {name: value for name, value in verdict.measured.items() if name in COLUMNS}
    written = run.windows[-1].time if run.windows else None
    age = None if written is None else max(0.0, (time.time() if now is None else now) - written)
    codes = [finding.key for finding in verdict.findings if finding.level == verdict.level]
    return Line(
        {
            **empty,
            "path": str(path),
            "run": run.name,
            "model": run.model,
            "level": MACHINE_LEVELS[verdict.level],
            "findings": " ".join(codes),
            **numbers,
            "age_s": None if age is None else round(age, 1),
        }
    )


def as_csv(lines: Sequence[Line]) -> str:
    """A table for spreadsheets, one row a run, a header row first."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: "" if value is None else value for name, value in line.values.items()})
    return out.getvalue()


def as_prometheus(lines: Sequence[Line]) -> str:
    """The text format of Prometheus, for the textfile collector: a gauge a number, labelled by path and run."""
    parts = []
    for name, words in _HELP.items():
        metric = f"chronomoe_{name}" if name != "age_s" else "chronomoe_age_seconds"
        parts.append(f"# HELP {metric} {words}\n# TYPE {metric} gauge\n")
        for line in lines:
            value = line.values[name]
            if name == "level":
                value = _LEVEL_NUMBERS.get(line.level or "", 3)
            if value is None:
                continue
            labels = ",".join(f'{key}="{_label(line.values[key])}"' for key in ("path", "run", "model"))
            parts.append(f"{metric}{{{labels}}} {value}\n")
    return "".join(parts)


def _label(value: Any) -> str:
    text = "" if value is None else str(value)
    return re.sub(r'([\\"])', r"\\\1", text).replace("\n", r"\n")
