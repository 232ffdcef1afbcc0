"""Run the CPU benchmarks again, say what differs from the committed tables, and write docs/results.md.

About half an hour on two idle cores, one after the other, one thread each (throughput: two processes).

    python benchmarks/bench.py                        # `make bench`: into build/bench
    python benchmarks/bench.py --results benchmarks/results     # over the committed tables
    python benchmarks/bench.py --only launches rivals

`balance` and `prune_quality` take hours; here they run in their quick forms, which check that they run and go to
`quick/` below build/bench whatever --results says. docs/results.md is always made from the committed tables.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import results_page

ROOT = Path(__file__).resolve().parent.parent
HERE, COMMITTED, BUILD = ROOT / "benchmarks", ROOT / "benchmarks" / "results", ROOT / "build" / "bench"
LIMIT_S = 40 * 60
SHOWN = 6  # differences of a table
# What tells one row of a table from another.
NAMES = ("setting", "shape", "shape of", "graph", "case", "tool", "model", "preset", "arm", "skew", "ranks", "grows")
NAMES += ("value", "layers", "experts", "way", "rank", "cut", "seed")


@dataclass(frozen=True)
class Part:
    """One script: its arguments, with OUTPUT where the directory goes, and whether it is a quick form."""

    name: str
    arguments: tuple[str, ...]
    quick: bool = False


PARTS = (
    Part("launches", ("cost/launches.py", "--large", "--label", "now", "--output", "OUTPUT")),
    Part("cost", ("cost/run.py", "--output", "OUTPUT")),
    Part("records", ("cost/records.py", "--output", "OUTPUT")),
    Part("rivals", ("rivals/run.py", "--output", "OUTPUT")),
    Part("overhead", ("cost/overhead.py", "--graph", "eager", "--pairs", "11", "--output", "OUTPUT")),
    Part("throughput", ("throughput/run.py", "--output", "OUTPUT")),
    Part("balance", ("balance/run.py", "--quick", "--output", "OUTPUT"), quick=True),
    Part("prune_quality", ("prune/run.py", "--quick", "--output", "OUTPUT"), quick=True),
)


def command(part: Part, output: Path) -> list[str]:
    """What is run."""
    words = [str(output) if word == "OUTPUT" else word for word in part.arguments]
    return [sys.executable, *(str(HERE / word) if word.endswith(".py") else word for word in words)]


def run(part: Part, results: Path) -> bool:
    """Run a part; its output goes to a log beside the tables. Prints its time; whether it succeeded."""
    output = BUILD / "quick" / part.name if part.quick else results
    if part.quick:
        shutil.rmtree(output, ignore_errors=True)  # it would keep what is there
    output.mkdir(parents=True, exist_ok=True)
    log = BUILD / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started, used = time.perf_counter(), _processor_seconds()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command(part, output), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    seconds, processor = time.perf_counter() - started, _processor_seconds() - used
    state = "done" if done.returncode == 0 else f"FAILED ({done.returncode})"
    quick = ", quick form" if part.quick else ""
    print(f"{part.name}: {state} in {seconds:.0f} s, {processor:.0f} s of processor time{quick}; {log}", flush=True)
    if done.returncode:
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]), flush=True)
    return done.returncode == 0


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Every number of a table by its path; rows of a list by what names them."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {}
    if isinstance(value, int | float):
        return {path: value}
    found: dict[str, float] = {}
    items = value.items() if isinstance(value, dict) else ((_label(each, at), each) for at, each in enumerate(value))
    for key, each in items:
        found |= numbers(each, f"{path}.{key}" if isinstance(value, dict) and path else f"{path}{key}")
    return found


def _label(row: Any, at: int) -> str:
    named = [
        f"{key}={row[key]}" for key in NAMES if isinstance(row, dict) and isinstance(row.get(key), str | int | float)
    ]
    return f"[{','.join(named) or at}]"


def differences(new: Path, old: Path) -> list[str]:
    """How a table that was made now differs from the committed one, as lines."""
    if new.suffix != ".json":
        lines = [path.read_text(encoding="utf-8").splitlines() for path in (old, new)]
        changed = [
            line
            for line in difflib.unified_diff(*lines, n=0, lineterm="")
            if line[:1] in "+-" and line[1:2] != line[:1]
        ]
        return [f"{new.stem}: as committed" if not changed else f"{new.stem}: {len(changed)} lines differ", *changed]
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in (new, old)]
    for table in tables:
        if isinstance(table.get("runs"), dict):  # launches.json keeps older runs: the last counts
            table["runs"] = list(table["runs"].values())[-1]
    now, before = map(numbers, tables)
    both = now.keys() & before.keys()
    changed = {
        key: abs(now[key] - before[key]) / max(abs(before[key]), 1e-9) for key in both if now[key] != before[key]
    }
    lines = [f"{new.stem}: {len(both)} numbers in both, {len(changed)} differ; {len(now.keys() - both)} new"]
    for key in sorted(changed, key=lambda key: -changed[key])[:SHOWN]:
        lines.append(f"  {key}: {before[key]:g} -> {now[key]:g}")
    return lines


def compare(results: Path) -> None:
    """Print what differs from the committed tables."""
    print("\nAgainst the committed tables (the largest relative differences):")
    for new in sorted(results.glob("*.json")) + sorted(results.glob("records.md")):
        old = COMMITTED / new.name
        print("\n".join(differences(new, old)) if old.is_file() else f"{new.stem}: not committed")


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=BUILD)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    options = parser.parse_args()
    results = options.results.resolve()
    started = time.perf_counter()
    chosen = [part for part in PARTS if options.only is None or part.name in options.only]
    failed = [part.name for part in chosen if not run(part, results)]
    total = time.perf_counter() - started
    if results != COMMITTED.resolve():
        compare(results)
    results_page.write(COMMITTED, ROOT / "docs")
    late = f"; more than the {LIMIT_S // 60} minutes that it should take on two idle cores" if total > LIMIT_S else ""
    print(f"\n{len(chosen)} parts in {total / 60:.1f} minutes{late}; wrote docs/results.md from benchmarks/results")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
