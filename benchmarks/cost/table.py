"""The page of benchmarks/cost/run.py."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def markdown(results: Row) -> str:
    """The tables that are read; `results` as in the JSON."""
    parts = [_head(results), _growth(results), _counts(results), _bytes(results), _scale(results)]
    return "\n".join(line for part in parts for line in [*part, ""]).rstrip() + "\n"


def _head(results: Row) -> list[str]:
    versions = results["versions"]
    return [
        "# What it costs, beside what one would write instead",
        "",
        "Written by `benchmarks/cost/run.py`, with `cost.json`. Launches by preset are in `launches.md`, the time of a "
        "step with "
        f"larger experts in `overhead.md`, moewatch in `rivals.md`. {results['machine']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}.",
        "",
        "- `chronomoe_hf observe`: the preset, windows of " + str(results["window"]) + " steps (the default is 100).",
        "- `router logits every step`: `output_router_logits=True`, softmax, top-k and bincount of every layer, and "
        "three "
        "numbers of each layer read for the log.",
        "- `hooks with .item()`: a forward hook on every router, bincount of its ids, the same three numbers read at "
        "once.",
        "",
        "The last two count padding, evaluation and recomputation too (`rivals.md`).",
    ]


def _shape(row: Row) -> str:
    return f"L {row['layers']}, E {row['experts']}, D {row['hidden']}, T {row['batch'] * row['length']:,}"


def _growth(results: Row) -> list[str]:
    names = list(results["growth"][0]["time"]["arms"])
    lines = [
        "## Processor time of a step on the CPU",
        "",
        f"Added milliseconds (ratio to the untouched step), medians of {results['rounds']} rounds in one process, "
        "every arm "
        "once a round. A Qwen3-MoE with k = 2 and experts of 32, so small that what is added shows; the first row is "
        "the "
        "base, the others change one thing. `untouched, a copy` is the noise; the machine was shared.",
        "",
        "| | untouched, ms | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in results["growth"]:
        cells = [
            f"{arm['added_ms'][1]:+.1f} ({arm['ratio'][1]:.2f})"
            for arm in (row["time"]["arms"][name] for name in names)
        ]
        lines.append(f"| {_shape(row)} | {row['time']['untouched_ms']:.0f} | " + " | ".join(cells) + " |")
    return lines


def _counts(results: Row) -> list[str]:
    names = list(results["growth"][0]["counts"])
    lines = [
        "## Launches and host reads of a step",
        "",
        "Counted on the pretend device of `tests/support/phantom.py`: forward, backward and what follows the step, "
        "between "
        "windows; `untouched` its own, the others what they add. A host read makes the host wait for the GPU.",
        "",
        "| launches (host reads) | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row in results["growth"]:
        cells = [f"{row['counts'][name]['launches']:,} ({row['counts'][name]['reads']})" for name in names]
        lines.append(f"| {_shape(row)} | " + " | ".join(cells) + " |")
    return lines


def _bytes(results: Row) -> list[str]:
    lines = [
        "## What ranks exchange, keep and write",
        "",
        "A step makes one all-reduce of 8 (L (9 E + 11) + 3) bytes, on any number of ranks. A step that closes a "
        "window adds "
        "64 bytes and 8 (2 L + 1) bytes, and with a lens that may act 8 L (2 D + 4) bytes in the first. Counted in two "
        "processes (gloo), bytes of each collective:",
        "",
        "| L | E | D | preset | between windows | formula | closes a window | formula |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["collectives"]:
        cells = [" + ".join(f"{n:,}" for n in row[key]) for key in ("between", "formula_between", "window")]
        cells.append(" + ".join(f"{n:,}" for n in row["formula_window"]))
        name = f"| {row['layers']} | {row['experts']} | {row['hidden']} | {row['preset']} | "
        lines.append(name + " | ".join(cells) + " |")
    lines += ["", "| records of a window, shape of | layers | experts | bytes |", "|---|---|---|---|"]
    for row in results["records"]:
        lines.append(f"| {row['shape of']} | {row['layers']} | {row['experts']} | {row['bytes']:,} |")
    lines += [
        "",
        "Bytes of state, fixed + L (a layer + E an expert + D a unit of width), found on four small models and checked "
        "on a "
        "fifth:",
        "",
        "| preset | fixed | a layer | an expert | a unit of width | fifth model: counted | said |",
        "|---|---|---|---|---|---|---|",
    ]
    for preset, fit in results["state"].items():
        numbers = (fit[key] for key in ("fixed", "per_layer", "per_expert", "per_width", "checked", "said"))
        lines.append(f"| {preset} | " + " | ".join(f"{n:,.0f}" for n in numbers) + " |")
    return lines


def _scale(results: Row) -> list[str]:
    found = results["scale"]
    assumed = found["assumed"]
    gpus = list(found["rows"][0]["reduce_ms"])
    tokens = list(found["rows"][0]["share"])
    lines = [
        "## Large models, on paper",
        "",
        "**Nothing in this table was measured on a GPU.** Bytes are the counted units above. Launches of a forward are "
        "counted on a pretend device at the widths and depth of each model (`shapes.md`), with 4 a layer for the "
        "backward of open lenses; those of `system.step`, which no shape changes, are in `launches.md` "
        f"(`{results['launches_run']}`). Assumed:",
        "",
        f"- A launch takes {assumed['launch_us']:g} us of host time, and none of it hides behind work of the GPU. "
        "Where the "
        "GPU is the bottleneck most of it hides: the shares are upper bounds in that.",
        f"- An all-reduce takes {assumed['hop_us']:g} us per doubling of the number of GPUs, and 2 (N - 1) / N of its "
        "bytes "
        f"at {assumed['bandwidth_gb_s']:g} GB/s. Waiting for a slower rank is not in it: the gradients' all-reduce "
        "waits "
        "for that rank as well.",
        f"- A step takes 6 FLOPs per active parameter and token at {assumed['utilisation']:.0%} of "
        f"{assumed['peak_tflops']:g} TFLOP/s. One micro-batch a step; every GPU runs all layers on tokens of its own, "
        "and "
        "has as many more launches as micro-batches.",
        "- `protect` has a lens open in every layer. DeepSeek-V3's widths are counted on a Qwen3-MoE; its `balance` "
        "moves the router's own bias, and its forward is that of `observe`.",
        "",
        "| model | preset | state | launches a step, "
        + " and ".join(f"{int(t):,}" for t in tokens)
        + " tokens | host time | bytes a step | all-reduce on "
        + ", ".join(f"{int(n):,}" for n in gpus)
        + " GPUs, ms "
        + "".join(
            f"| share of a step, {int(t):,} tokens a GPU, on {int(gpus[0])} and {int(gpus[-1]):,} GPUs " for t in tokens
        )
        + "|",
        "|---|---|---|---|---|---|---" + "|---" * len(tokens) + "|",
    ]
    for row in found["rows"]:
        launched = ", ".join(f"{row['launches'][t]:,}" for t in tokens)
        host = ", ".join(f"{row['host_ms'][t]:.1f}" for t in tokens)
        shares = "".join(
            f"| {row['share'][t][gpus[0]]:.2%}, {row['share'][t][gpus[-1]]:.2%} of "
            f"{found['step_s'][row['model']][t]:.2f} s "
            for t in tokens
        )
        lines.append(
            f"| {row['model']} | {row['preset']} | {row['state_mb']:.2f} MB | {launched} | {host} ms "
            f"| {row['reduced_kb']:,.0f} kB | " + ", ".join(f"{row['reduce_ms'][n]:.2f}" for n in gpus) + f" {shares}|"
        )
    return lines
