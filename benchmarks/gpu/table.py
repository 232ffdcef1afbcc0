"""The page of benchmarks/gpu/run.py."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def markdown(results: Row) -> str:
    """The tables that are read; `results` as in the JSON."""
    bench, versions = results["bench"], ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines = [
        "# On a GPU",
        "",
        f"A Qwen3-MoE of {bench['layers']} layers of Qwen3-30B-A3B's shape unless the table says otherwise: width "
        f"{bench['hidden']}, {bench['experts']} experts of {bench['width']}, k = {bench['top_k']}, {bench['dtype']}. A "
        "window "
        f"closes every {bench['interval']} steps (default: 100). {results['machine']}; {versions}. Written by "
        "`benchmarks/gpu/run.py`, with `gpu.json`.",
    ]
    if bench["device"] != "cuda":
        lines += ["", "**This ran without a GPU, with a tiny model: it shows that the script runs, and nothing else.**"]
    for name, part in results["parts"].items():
        title, writer = TABLES[name]
        lines += ["", f"## {title}", "", f"{part['seconds']:.0f} s.", ""]
        lines += [f"Failed: `{part['error']}`"] if "error" in part else writer(part["rows"])
    return "\n".join(lines) + "\n"


def _grid(head: list[str], cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


def _time(row: Row) -> list[str]:
    low, middle, high = row["ratio"]
    return [f"{row['untouched_ms']:.2f} ms", f"{middle:.3f} ({low:.3f} - {high:.3f})", f"{row['added_ms'][1]:+.2f} ms"]


def _overhead(rows: list[Row]) -> list[str]:
    cells = [[f"{row['tokens']:,}", row["arm"], *_time(row)] for row in rows]
    return _grid(["tokens", "on it", "untouched step", "ratio (quartiles)", "added"], cells)


def _syncs(rows: list[Row]) -> list[str]:
    cells = [[r["arm"], str(r["waits_in_forward_and_backward"]), r["step_error"] or "does not wait"] for r in rows]
    return _grid(["on it", "waits in forward and backward", "after the step, between windows"], cells)


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _equal(rows: list[Row]) -> list[str]:
    keys = ("losses_equal", "tensors_equal", "first_loss_as_untouched")
    cells = [[row["arm"], str(row["steps"]), *(_yes(row[key]) for key in keys)] for row in rows]
    return _grid(["on it", "steps", "losses equal", "weights and state equal", "first loss as untouched"], cells)


def _launches(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        said = row["pretend"]
        pairs = [(row["per_layer"], said["forward_per_layer"]), (row["fixed"], said["forward_fixed"])]
        pairs.append((row["step_fixed"], said["step_fixed"]))
        numbers = [f"{seen:g} ({pretend:g})" for seen, pretend in pairs]
        cells.append([row["arm"], *numbers, f"{row['step_per_layer']:g}"])
    head = ["on it", "a layer", "fixed", "step: fixed", "step: a layer"]
    note = [
        "By the profiler, the pretend device's count in brackets; `untouched` its own, the others what they add.",
        "",
    ]
    return note + _grid(head, cells)


def _memory(rows: list[Row]) -> list[str]:
    cells = [[row["arm"], f"{row['peak'] / 2**20:,.1f} MiB", f"{row['added'] / 2**20:+,.1f} MiB"] for row in rows]
    return _grid(["on it", "peak of a step", "added"], cells)


def _compiled(rows: list[Row]) -> list[str]:
    cells = [[row["arm"], *_time(row), str(row["recompiled"])] for row in rows]
    note = ["`fullgraph=True`, 2 layers, both models compiled.", ""]
    return note + _grid(
        ["on it", "untouched step", "ratio (quartiles)", "added", "compilations after the warm-up"], cells
    )


def _suite(rows: list[Row]) -> list[str]:
    return _grid(["tests that need a GPU", "result"], [[row["file"], row["result"]] for row in rows])


def _ranks(rows: list[Row]) -> list[str]:
    if "left_out" in rows[0]:
        return [rows[0]["left_out"]]
    cells = [[r["model"], str(r["processes"]), f"{r['bytes']:,}", f"{r['ms']:.3f} ms"] for r in rows if "ms" in r]
    state = rows[-1]
    note = f"State equal on all ranks; {state['counted']:,} assignments counted of {state['expected']:,}."
    return [*_grid(["all-reduce of a step of", "processes", "bytes", "time"], cells), "", note]


TABLES = {
    "overhead": ("Time of a step", _overhead),
    "syncs": ("Waiting for the GPU", _syncs),
    "equal_runs": ("Two runs", _equal),
    "launches": ("Launches", _launches),
    "memory": ("Memory", _memory),
    "compiled": ("torch.compile", _compiled),
    "suite": ("Tests", _suite),
    "ranks": ("Ranks", _ranks),
}
