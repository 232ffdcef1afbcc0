"""The page of the study, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """The tables that are read; `results` as in the JSON."""
    lines = [
        "# Large shapes",
        "",
        "What recording and governing add at the layouts and widths of large models, by `benchmarks/shapes/run.py`.",
        f"{', '.join(f'{name} {version}' for name, version in results.get('versions', {}).items())}.",
        *_counts(results),
        *_times(results),
        *_growth(results),
    ]
    took = results.get("took", {})
    if took:
        total = sum(each["seconds"] for each in took.values())
        lines += ["", f"The parts took {total / 60:.0f} minutes together ({_took(took)})."]
    return "\n".join(lines).rstrip() + "\n"


def _took(took: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {each['seconds']} s, load {each['load_at_start']} at its start" for name, each in took.items()
    )


def _counts(results: dict[str, Any]) -> Iterator[str]:
    if not results.get("rows"):
        return
    yield from (
        "",
        "## Launches and memory of a forward",
        "",
        "Launches and memory that recording adds to one forward at the widths of large models, at their own depth:",
        "counted on a pretend device, not timed and not measured on a GPU. Fixed launches are in the figure a layer.",
        "Where a lens is open a backward adds four a layer. Memory is the peak over the untouched model's, beside the",
        "bound that the chunks are made for, 64 MB and 3 MB a layer.",
        "",
        "| model | layers | case | launches | a layer | host reads | memory | bound |",
        "|---|---|---|---|---|---|---|---|",
    )
    for row in results["rows"]:
        yield (
            f"| {row['model']} | {row['layers']} | {row['case']} | {row['launches']} | {row['a_layer']:.1f} "
            f"| {row['reads']} | {row['memory_mb']:.0f} MB | {row['bound_mb']} MB |"
        )


def _times(results: dict[str, Any]) -> Iterator[str]:
    titles = {
        "real": "Real widths",
        "narrow": "Full layouts, narrow widths: D 64, experts of width 32, so that what is added shows",
    }
    for part, title in titles.items():
        if not results.get(part):
            continue
        yield from (
            "",
            f"## {title}",
            "",
            "Processor time of one thread, random weights; step = forward, backward, SGD and `system.step`. Ratio:",
            "median over rounds of a step over the untouched model's of the same round, with its range; every lens is",
            "open under `protect`. Last: the step that closes a window. Over 10, over 100: mean ratio of a window of",
            "that many steps. Window: `system.step` in the step that closes it.",
            "Noise: the slowest of the untouched model's own steps over the fastest.",
            "",
            "| model | MoE layers | tokens | preset | untouched step | noise | ratio | last | over 10 | over 100 "
            "| `system.step` | window | wrap | held |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        )
        for row in results[part]:
            ratio = "{:.3f} [{:.3f}, {:.3f}]".format(row["ratio"], *row["ratio_range"])
            yield (
                f"| {row['model']} | {row['shape']} | {row['tokens']} | {row['preset']} | {row['untouched_s']:.2f} s "
                f"| {row['untouched_spread']:.2f} | {ratio} | {row['last_step']:.3f} "
                f"| {row['over_10']:.3f} | {row['over_100']:.3f} | {row['step_ms']:.1f} ms | {row['window_ms']:.0f} ms "
                f"| {row['wrap_ms']:.0f} ms | {row['held_mb']:.1f} MB |"
            )


def _growth(results: dict[str, Any]) -> Iterator[str]:
    if not results.get("growth"):
        return
    yield from (
        "",
        "## How it grows",
        "",
        "Processor ms that a forward costs over the untouched model's, from L 2, E 32, k 4, D 128, T 1024 with one",
        "size changed; the exponent is that from the last but one point to the last, beside the untouched model's own.",
        "",
        "| size | points | preset | added, ms | exponent | model's own |",
        "|---|---|---|---|---|---|",
    )
    for row in results["growth"]:
        points, added = (", ".join(map(str, row[name])) for name in ("points", "added_ms"))
        yield f"| {row['what']} | {points} | {row['preset']} | {added} | {row['exponent']} | {row['own_exponent']} |"
    seen = results.get("windows")
    if seen:
        (few, many), (short, long) = seen["points"], seen["ms"]
        yield ""
        yield f"Windows of a run with records, 8 layers of 64 experts: {few} take {short} ms, {many} take {long} ms,"
        yield f"exponent {seen['exponent']}."
