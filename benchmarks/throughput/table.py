"""The page of benchmarks/throughput/run.py."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """The tables that are read; `results` as in the JSON."""
    return "\n".join([*_measured(results), "", *_modelled(results)]) + "\n"


def _measured(results: dict[str, Any]) -> list[str]:
    shape, versions = results["shape"], results["versions"]
    lines = [
        "# Balance as throughput",
        "",
        f"Two processes of Transformers' expert parallelism (`DistributedConfig(fsdp_size=2, ep_size=2)`, gloo): a "
        f"Qwen3-MoE of {shape['layers']} layers with {shape['experts']} experts, k = {shape['top_k']}, "
        f"width {shape['hidden']}, experts of {shape['width']}, {results['local_experts']} experts on each "
        f"rank, {results['tokens']:,} tokens a step. The routers of the first rank's experts are turned towards a "
        "direction that all embeddings share, by `skew`. `none` observes, `balance` is the preset, `full balance` "
        'evens out every share (`dead_zone=None, rate=0.3, first_layer="same"`). '
        f"{results['settle']} small steps of each, then {results['pairs']} rounds of one step of each, the order "
        "turning: medians. "
        f"{results['machine']}; the machine was shared, so that the time of a "
        f"step is noisy; the processor time of the busiest rank is less so. torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Written by `benchmarks/throughput/run.py`, with `throughput.json`.",
        "",
        "| skew | arm | max violation, first step | then | busiest rank over mean | step, s (quartiles) | tokens/s "
        "| processor time of the busiest rank, s | `none` over this: time | processor time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        low, high = row["seconds_quartiles"]
        ratios = [
            "{1:.2f} ({0:.2f} - {2:.2f})".format(*row[key]) if (key := f"none_over_this_{name}") in row else ""
            for name in ("seconds", "cpu")
        ]
        lines.append(
            f"| {row['skew']:g} | {row['arm']} | {row['max_violation_start']:.2f} | {row['max_violation']:.2f} "
            f"| {row['busiest_rank']:.2f} | {row['seconds']:.3f} ({low:.3f} - {high:.3f}) | {row['tokens_per_s']:,} "
            f"| {row['busiest_cpu']:.3f} | {ratios[0]} | {ratios[1]} |"
        )
    lines += [
        "",
        f"Least squares within each skew: a step takes 1 + f (I - 1) of a balanced one, I the load of the busiest rank "
        f"over the mean, with f = {results['fitted_share']:.2f} (processor time).",
    ]
    return lines


def _modelled(results: dict[str, Any]) -> list[str]:
    loads = results["loads"]
    size = loads["size"]
    shares = list(results["modelled"][0]["step"])
    lines = [
        "## A step on 8 and 64 ranks, modelled",
        "",
        f"Not measured: 1 + f (I - 1) with the loads of a Qwen3-MoE of {size['layers']} layers with {size['experts']} "
        f"experts, k = {size['top_k']}, pretrained for {loads['pretrain_steps']} steps on prose and fine-tuned for "
        f"{loads['steps']} on code; the last third of the run, counts added up over {loads['window']} steps. Ranks own "
        f"consecutive experts. f is the share of a balanced step that waits for experts: an assumption. Exchange of "
        f"tokens costs nothing in this model.",
        "",
        "| ranks | experts a rank | arm | max violation | busiest rank over mean "
        + "".join(f"| step, f = {share} " for share in shares)
        + "|",
        "|---|---|---|---|---" + "|---" * len(shares) + "|",
    ]
    for row in results["modelled"]:
        lines.append(
            f"| {row['ranks']} | {size['experts'] // row['ranks']} | {row['arm']} | {row['max_violation']:.2f} "
            f"| {row['load']:.2f} " + "".join(f"| {row['step'][share]:.2f} " for share in shares) + "|"
        )
    missing = {row["arm"] for row in results["rows"]} - {row["arm"] for row in results["modelled"]}
    if missing:
        lines += ["", "Not run for this part: " + ", ".join(f"`{arm}`" for arm in sorted(missing)) + "."]
    return lines
