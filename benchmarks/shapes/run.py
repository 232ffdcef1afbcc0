"""What recording and governing cost at the shapes of large models: launches and memory, time, and how they grow.

Launches and memory are counted on a pretend device; times are processor time of one thread, every preset in turns with
the untouched model in one process. About half an hour on two cores, 12 GB. Writes ``shapes.json`` and ``shapes.md``;
parts that are not asked for stay as they were.

    python benchmarks/shapes/run.py [--parts counts narrow real growth] [--models NAME ...] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # the pretend device lives with the tests

from shapes import layouts, timing, widths
from shapes.table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"
PARTS = ("counts", "narrow", "real", "growth")


class Results:
    """The file that is written, and what of it is kept."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "shapes.json"
        self.held: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        self.held["versions"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }

    def put(self, part: str, model: str, rows: list[dict[str, Any]]) -> None:
        """Replace a model's rows of a part, and write."""
        order = [each.name for each in (*widths.WIDTHS, *layouts.NARROW, *layouts.REAL)]
        kept = [row for row in self.held.get(part, []) if row["model"] != model and row["model"] in order]
        self.held[part] = sorted(kept + rows, key=lambda row: order.index(row["model"]))
        self.write()

    def write(self) -> None:
        """Write both files."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.held, indent=2) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(markdown(self.held), encoding="utf-8")


def run_part(part: str, results: Results, models: list[str] | None) -> None:
    """One of PARTS."""
    if part == "growth":
        results.held["growth"], results.held["windows"] = timing.growth(), timing.windows()
        results.write()
        return
    of_part = {"counts": ("rows", widths.WIDTHS, widths.table)}
    of_part |= {"narrow": ("narrow", layouts.NARROW, timing.measure), "real": ("real", layouts.REAL, timing.measure)}
    name, known, make = of_part[part]
    for each in known:
        if models is None or each.name in models:
            start = time.perf_counter()
            rows = make(each)  # type: ignore[operator]
            results.put(name, each.name, rows)
            print(*map(json.dumps, rows), f"{each.name}: {time.perf_counter() - start:.0f} s", sep="\n", flush=True)


def main() -> None:
    """Measure and print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", help="only these; all, by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.output)
    for part in options.parts:
        start, load = time.perf_counter(), os.getloadavg()[0]
        run_part(part, results, options.models)
        seconds = round(time.perf_counter() - start)
        results.held.setdefault("took", {})[part] = {"seconds": seconds, "load_at_start": round(load, 2)}
        results.write()
        print(f"{part}: {seconds} s", flush=True)


if __name__ == "__main__":
    main()
