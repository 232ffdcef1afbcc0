"""Recording at the widths and depths of large models: launches and memory, counted on a pretend device.

Writes ``shapes.json`` and ``shapes.md``; rows of models that are not counted in a run stay as they were. Ten minutes a
model on a busy machine with two cores, 3 to 8 GB.

    python benchmarks/shapes/run.py [--models "Qwen3-235B-A22B" ...] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # the pretend device lives with the tests

from shapes.widths import WIDTHS, table

RESULTS = Path(__file__).resolve().parents[1] / "results"


def markdown(results: dict[str, Any]) -> str:
    """The table that is read; `results` as in the JSON."""
    lines = [
        "# Large shapes",
        "",
        "Launches and memory that recording adds to one forward at the widths of large models, at their own depth:",
        "counted on a pretend device by `benchmarks/shapes/run.py`, not timed and not measured on a GPU. Fixed",
        "launches are in the figure a layer. Where a lens is open a backward adds four a layer. Memory is the",
        "peak over the untouched model's, beside the bound that the chunks are made for, 64 MB and 3 MB a layer.",
        "",
        "| model | layers | case | launches | a layer | host reads | memory | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['layers']} | {row['case']} | {row['launches']} | {row['a_layer']:.1f} "
        f"| {row['reads']} | {row['memory_mb']:.0f} MB | {row['bound_mb']} MB |"
        for row in results["rows"]
    ]
    return "\n".join([*lines, "", *results.get("notes", [])]).rstrip() + "\n"


def main() -> None:
    """Count and print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[width.name for width in WIDTHS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.output / "shapes.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    for width in (width for width in WIDTHS if width.name in options.models):
        made = table(width)
        results["rows"] = [row for row in results["rows"] if row["model"] != width.name] + made
        results["notes"] = []
        print(*map(json.dumps, made), sep="\n", flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
